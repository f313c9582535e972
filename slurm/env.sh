# What a job needs before its first command: PATH, launcher, threads. Sourced by train.sbatch, probe.sbatch and chain.sh;
# a variable that is already set when the job is submitted wins over what is said here.
# Sets: LAUNCH (an array: the words before the program that start it on every rank), MARK (this job's or chain's name).

# ---- this site's own lines: modules, networks, folders. `sbatch slurm/probe.sbatch` says what they must be. ----------
# module purge && module load openmpi/5.0 cuda/13.0
# export HPCPIPE_LAUNCHER="${HPCPIPE_LAUNCHER:-pmi2}"   # MPICH, Intel MPI
# export OMPI_MCA_btl_tcp_if_include=10.0.0.0/8         # Open MPI over TCP where nodes have several networks
# export UCX_NET_DEVICES=mlx5_0:1                       # UCX: the adapter to use
# ---- the end of them -------------------------------------------------------------------------------------------------

# The folder with slurm/ and .venv; another one than where sbatch was typed is named by HPCPIPE_HOME.
export HPCPIPE_HOME="${HPCPIPE_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
export PATH="$HPCPIPE_HOME/.venv/bin:$PATH"

# How the ranks find each other.
#   pmix    srun starts the ranks; Open MPI 4 and 5. The default.
#   pmi2    srun starts the ranks; MPICH, Intel MPI, MVAPICH.
#   mpirun  the MPI's own mpirun, where srun has no plugin for it. It hears of a cancelled or preempted job too roughly
#           to save, so such a job goes on from its last checkpoint; with GPUs ask with --gpus-per-node.
HPCPIPE_LAUNCHER="${HPCPIPE_LAUNCHER:-${SLURM_MPI_TYPE:-pmix}}"
case "$HPCPIPE_LAUNCHER" in
  mpirun) LAUNCH=(mpirun -n "${SLURM_NTASKS:-${SLURM_JOB_NUM_NODES:-1}}") ;;
  *)
    # Half a minute after the first rank has ended, well or not, the others are ended: time for all of them to end by
    # themselves, so that the status is theirs (--kill-on-bad-exit would make it that of a killed one).
    LAUNCH=(srun --kill-on-bad-exit=0 --wait=30)
    export SLURM_MPI_TYPE="$HPCPIPE_LAUNCHER"
    ;;
esac

# The other barriers of the pmix plugin (mixed, its default, and tree) may let a rank leave MPI_Init before all are ready:
# its first message then ends a rank of Open MPI 5 with a segmentation fault (open-mpi/ompi issue 12495).
export SLURM_PMIX_FENCE="${SLURM_PMIX_FENCE:-ring}"

# How many attempts of a job, or links of a chain, may end in a row without a new checkpoint; what they are counted by.
HPCPIPE_TRIES="${HPCPIPE_TRIES:-2}"
MARK="${HPCPIPE_CHAIN:-${SLURM_JOB_ID:-}}"

# Since Slurm 22.05 srun does not inherit --cpus-per-task. A rank's threads are device.threads or all cores it is given;
# pools of other libraries would only be in their way.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
