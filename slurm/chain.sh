#!/bin/bash
# A run that needs more than one job's time where jobs may not requeue themselves, and runs over several seeds:
#
#     slurm/chain.sh 5 -N 4 --ntasks-per-node=8 -- run.toml
#     slurm/chain.sh 2 -N 4 --array=1-8 -- run.toml --set seed=%a --set out=runs/mine-%a
#
# submits that many jobs of train.sbatch, each of which begins when the last one has ended in any way (afterany) and goes
# on from its newest whole checkpoint. Links after the end of the run end at once. Between the number and -- stand options
# of sbatch, after it what `hpcpipe train` is given; %a is the number of an array's task. Prints the job ids, first to last.

set -u
usage() {
  echo "chain.sh: $1; slurm/chain.sh LINKS [OPTION OF SBATCH]... -- RUN.toml [--set section.key=value]..." >&2
  exit 2
}

links="${1:-}"
[[ "$links" =~ ^[1-9][0-9]*$ ]] || usage "the first word is the number of jobs, not '$links'"
shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  options+=("$1")
  shift
done
[ $# -ge 2 ] || usage "the run's TOML is missing after --"
shift

case " ${options[*]:-} " in
  *" --array"* | *" -a"*)
    [[ " $* " == *" out="*%a* ]] || usage "every task of an array needs a folder of its own (--set out=runs/mine-%a)"
    ;;
esac

HPCPIPE_HOME="${HPCPIPE_HOME:-$PWD}"
script="$HPCPIPE_HOME/slurm/train.sbatch"
[ -r "$script" ] || usage "there is no $script: type this in the folder of hpcpipe, or set HPCPIPE_HOME to it"

# All links count their attempts together, so that a chain that gets nowhere stops.
export HPCPIPE_HOME HPCPIPE_CHAIN="chain-$(date +%s)-$$"
after=()
for ((link = 1; link <= links; link++)); do
  job=$(sbatch --parsable --no-requeue ${after[@]+"${after[@]}"} ${options[@]+"${options[@]}"} "$script" "$@") || exit 1
  job="${job%%;*}"
  after=("--dependency=afterany:$job")
  echo "$job"
done
