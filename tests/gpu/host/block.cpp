/* block.cpp: runs a grid, block by block, the threads of a block as fibers on one thread of the host.
 *
 * A fiber runs until it waits (barrier, warp instruction) or returns. The scheduler goes through the threads in the
 * order asked for (0 forward, 1 backward, else shuffled anew each time with that seed) and runs those that can; when
 * none can and not all have returned, the block is stuck, and the sentence says who waits where and who never came. A
 * touched page that is not there ends the launch with a sentence, too, and not the process. */
#include <errno.h>
#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <vector>
#include "cuda_on_host.h"

#if defined(__x86_64__) && !defined(HP_HOST_UCONTEXT)
#define HP_HOST_ASSEMBLY /* some ten instructions per switch, where ucontext needs two system calls */
#else
#include <ucontext.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
unsigned char *hp_host_dynamic_shared;

namespace {
const size_t STACK = 128 << 10, GUARD = 4096, DYNAMIC = 256 << 10, CANARY = 4096;
const int MOST_THREADS = 1024;
const unsigned char POISON = 0xff; /* a NaN as float32, bfloat16 and float64 */

enum State { READY, AT_BARRIER, IN_WARP, RETURNED };
struct Copy {
  void *to;
  const void *from;
  bool there;
  int group;
};
struct Fiber {
#ifdef HP_HOST_ASSEMBLY
  void *stack_pointer;
#else
  ucontext_t context;
#endif
  State state;
  uint3 index;
  uint32_t mask; /* of the warp instruction it waits in */
  const char *what;
  void *slot;
  std::vector<Copy> copies;
  int group; /* how many groups of copies it has committed */
};

struct Launch {
  const hp_host_kernel *kernel;
  const uint64_t *args;
  int threads;
};

Fiber fibers[MOST_THREADS];
Fiber host; /* the scheduler's side of a switch */
Fiber *current;
unsigned char *stacks;
Launch launch;
char sentence[600];
sigjmp_buf way_out;
uint64_t random_state;
__thread char in_shared = 1; /* makes a TLS segment, and its address known, also where no kernel has shared memory */

uint64_t next_random() {
  random_state += 0x9E3779B97F4A7C15ull;
  uint64_t z = random_state;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

void arrange(std::vector<uint32_t> &order, int how) {
  const size_t n = order.size();
  for (size_t i = 0; i < n; i++) order[i] = (uint32_t)(how == 1 ? n - 1 - i : i);
  for (size_t i = n; how > 1 && i > 1; i--) std::swap(order[i - 1], order[next_random() % i]);
}

/* ---- switching ----------------------------------------------------------------------------------------------------- */
void body() {
  launch.kernel->run(launch.args);
  hp_host_copy_commit(), hp_host_copy_wait(0);
  current->state = RETURNED;
}

#ifdef HP_HOST_ASSEMBLY
extern "C" void hp_host_switch(void **save, void *load);
__asm__(
    ".text\n.hidden hp_host_switch\n.globl hp_host_switch\n.type hp_host_switch,@function\nhp_host_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size hp_host_switch, . - hp_host_switch\n");
void go(Fiber *from, Fiber *to) { hp_host_switch(&from->stack_pointer, to->stack_pointer); }
void start() {
  body();
  go(current, &host);
  abort();
}
void prepare(Fiber *fiber, unsigned char *stack) {
  void **top = (void **)(stack + STACK) - 1; /* as if called: 8 bytes off a multiple of 16 */
  *--top = (void *)start;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber->stack_pointer = top;
}
#else
void go(Fiber *from, Fiber *to) { swapcontext(&from->context, &to->context); }
void start() {
  body();
  go(current, &host);
  abort();
}
void prepare(Fiber *fiber, unsigned char *stack) {
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = STACK;
  makecontext(&fiber->context, start, 0);
}
#endif

void wait() { go(current, &host); }

/* ---- saying what is wrong ------------------------------------------------------------------------------------------ */
int index_of(const Fiber *fiber) { return (int)(fiber - fibers); }

int place(char *text, size_t room, const Fiber *fiber) {
  return snprintf(text, room, "%s: thread (%u,%u,%u) of block (%u,%u,%u)", launch.kernel->name, fiber->index.x,
                  fiber->index.y, fiber->index.z, blockIdx.x, blockIdx.y, blockIdx.z);
}

const char *where(const Fiber *fiber) {
  if (fiber->state == RETURNED) return "has returned";
  static char text[100];
  snprintf(text, sizeof text, "waits at %s", fiber->state == AT_BARRIER ? "__syncthreads" : fiber->what);
  return text;
}

bool expects(const Fiber *waiting, const Fiber *other) {
  if (waiting->state == AT_BARRIER) return other->state != AT_BARRIER;
  if (index_of(waiting) / 32 != index_of(other) / 32 || !(waiting->mask >> (index_of(other) % 32) & 1)) return false;
  return other->state != IN_WARP || other->mask != waiting->mask || strcmp(other->what, waiting->what);
}

[[noreturn]] void stuck() {
  for (int i = 0; i < launch.threads; i++) {
    const Fiber *fiber = &fibers[i];
    if (fiber->state == RETURNED) continue;
    for (int j = 0; j < launch.threads; j++) {
      const Fiber *other = &fibers[j];
      if (!expects(fiber, other)) continue;
      int n = place(sentence, sizeof sentence, fiber);
      n += snprintf(sentence + n, sizeof sentence - n, " %s, but thread (%u,%u,%u)", where(fiber), other->index.x,
                    other->index.y, other->index.z);
      snprintf(sentence + n, sizeof sentence - n, " %s", where(other));
      siglongjmp(way_out, 1);
    }
  }
  snprintf(sentence, sizeof sentence, "%s: no thread can go on", launch.kernel->name);
  siglongjmp(way_out, 1);
}

void fault(int signal, siginfo_t *info, void *) {
  const int n = place(sentence, sizeof sentence, current ? current : &fibers[0]);
  snprintf(sentence + n, sizeof sentence - n, " touched address %p, which is not its to touch (signal %d)",
           info->si_addr, signal);
  siglongjmp(way_out, 1);
}

/* ---- subnormals are flushed, read and written, as with nvcc -ftz=true ------------------------------------------------ */
#if defined(__x86_64__)
uint64_t float_control() { return _mm_getcsr(); }
void set_float_control(uint64_t control) { _mm_setcsr((unsigned)control); }
const uint64_t FLUSH = 0x8040;
#elif defined(__aarch64__)
uint64_t float_control() {
  uint64_t control;
  __asm__ volatile("mrs %0, fpcr" : "=r"(control));
  return control;
}
void set_float_control(uint64_t control) { __asm__ volatile("msr fpcr, %0" ::"r"(control)); }
const uint64_t FLUSH = 1 << 24;
#else
#error "block.cpp: say how this processor flushes subnormals"
#endif

/* ---- shared memory ------------------------------------------------------------------------------------------------- */
struct Segment {
  unsigned char *at;
  size_t size;
};
int find_segment(dl_phdr_info *info, size_t, void *found) {
  bool mine = false;
  size_t size = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) &part = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr, here = (uintptr_t)&find_segment;
    if (part.p_type == PT_LOAD && here >= begin && here < begin + part.p_memsz) mine = true;
    if (part.p_type == PT_TLS) size = part.p_memsz;
  }
  if (mine) *(Segment *)found = {(unsigned char *)info->dlpi_tls_data, size};
  return mine;
}

void run_block(std::vector<uint32_t> &order, int how, const Segment &fixed, int64_t dynamic) {
  memset(fixed.at, POISON, fixed.size);
  memset(hp_host_dynamic_shared, POISON, (size_t)dynamic);
  memset(hp_host_dynamic_shared + dynamic, 0x5a, CANARY);
  for (int i = 0; i < launch.threads; i++) {
    Fiber *fiber = &fibers[i];
    const unsigned x = (unsigned)i % blockDim.x, y = (unsigned)i / blockDim.x % blockDim.y;
    fiber->state = READY, fiber->index = {x, y, (unsigned)i / (blockDim.x * blockDim.y)};
    fiber->copies.clear(), fiber->group = 0;
    prepare(fiber, stacks + (size_t)i * (STACK + GUARD) + GUARD);
  }
  for (int returned = 0, arrived; returned < launch.threads;) {
    bool moved = false;
    if (how > 1) arrange(order, how);
    for (uint32_t i : order) {
      if (fibers[i].state != READY) continue;
      current = &fibers[i], threadIdx = current->index, moved = true;
      go(&host, current);
    }
    current = nullptr, returned = arrived = 0;
    for (int i = 0; i < launch.threads; i++) {
      returned += fibers[i].state == RETURNED, arrived += fibers[i].state == AT_BARRIER;
    }
    if (arrived == launch.threads) {
      for (int i = 0; i < launch.threads; i++) fibers[i].state = READY;
    } else if (!moved) {
      stuck();
    }
  }
  for (size_t i = 0; i < CANARY; i++) {
    if (hp_host_dynamic_shared[dynamic + i] != 0x5a) {
      current = &fibers[0];
      hp_host_fail("something wrote byte %zu of %lld bytes of dynamic shared memory", (size_t)dynamic + i,
                   (long long)dynamic);
    }
  }
}

void run_grid(const uint32_t *grid, int64_t dynamic, int how) {
  static std::vector<uint32_t> order, blocks; /* a launch that fails is left by a jump: nothing here may need an end */
  order.resize(launch.threads), blocks.resize((size_t)grid[0] * grid[1] * grid[2]);
  Segment fixed = {nullptr, 0};
  *(volatile char *)&in_shared = 1; /* the thread's copy of the segment exists from its first use on */
  dl_iterate_phdr(find_segment, &fixed);
  arrange(order, how), arrange(blocks, how);
  for (uint32_t block : blocks) {
    blockIdx = {block % grid[0], block / grid[0] % grid[1], block / (grid[0] * grid[1])};
    run_block(order, how, fixed, dynamic);
  }
}

bool set_up() {
  if (stacks) return true;
  const size_t all = MOST_THREADS * (STACK + GUARD);
  void *room = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return false;
  for (int i = 0; i < MOST_THREADS; i++) mprotect((char *)room + i * (STACK + GUARD), GUARD, PROT_NONE);
  hp_host_dynamic_shared = (unsigned char *)aligned_alloc(128, DYNAMIC + CANARY);
  stacks = (unsigned char *)room;
  return hp_host_dynamic_shared != nullptr;
}
}  // namespace

/* ---- what kernels call --------------------------------------------------------------------------------------------- */
void hp_host_fail(const char *format, ...) {
  const int n = place(sentence, sizeof sentence, current);
  memcpy(sentence + n, ": ", 3);
  va_list rest;
  va_start(rest, format);
  vsnprintf(sentence + n + 2, sizeof sentence - n - 2, format, rest);
  va_end(rest);
  siglongjmp(way_out, 1);
}

void hp_host_barrier(void) {
  current->state = AT_BARRIER;
  wait();
}

void hp_host_exchange(uint32_t mask, const char *what, hp_host_combine combine, void *slot) {
  const int lane = index_of(current) % 32, first = index_of(current) - lane;
  if (!(mask >> lane & 1)) hp_host_fail("%s with mask %08x, which lacks its own lane %d", what, mask, lane);
  current->state = IN_WARP, current->mask = mask, current->what = what, current->slot = slot;
  void *slots[32] = {nullptr};
  bool all = true;
  for (int i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= launch.threads) hp_host_fail("%s with mask %08x, but there is no lane %d", what, mask, i);
    all = all && !expects(current, &fibers[first + i]);
    slots[i] = fibers[first + i].slot;
  }
  if (!all) {
    wait();
    return;
  }
  combine(slots, mask);
  for (int i = 0; i < 32; i++) {
    if (mask >> i & 1) fibers[first + i].state = READY;
  }
}

/* A copy is done as late as the rules allow: when its thread waits for it. */
void hp_host_copy_async(void *to, const void *from, bool there) {
  if ((uintptr_t)to % 16 || (there && (uintptr_t)from % 16)) hp_host_fail("cp.async needs 16-byte aligned addresses");
  current->copies.push_back({to, from, there, current->group});
}
void hp_host_copy_commit(void) { current->group++; }
void hp_host_copy_wait(int groups) {
  std::vector<Copy> later;
  for (const Copy &copy : current->copies) {
    if (copy.group >= current->group - groups) {
      later.push_back(copy);
    } else if (copy.there) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
  }
  current->copies.swap(later);
}

/* ---- what Python calls --------------------------------------------------------------------------------------------- */
/* Runs kernel number `which` of hp_host_kernels; a sentence where it failed, null where it did not. */
extern "C" __attribute__((visibility("default"))) const char *hp_host_launch(int which, const uint64_t *args,
                                                                             const uint32_t *grid,
                                                                             const uint32_t *block, int64_t dynamic,
                                                                             int how) {
  if (!set_up()) return "no memory for stacks";
  launch = {&hp_host_kernels[which], args, (int)(block[0] * block[1] * block[2])};
  if (launch.threads > MOST_THREADS || dynamic > (int64_t)DYNAMIC) return "more threads or shared memory than there is";
  gridDim = dim3(grid[0], grid[1], grid[2]), blockDim = dim3(block[0], block[1], block[2]);
  random_state = (uint64_t)how;
  static unsigned char signal_stack[64 << 10];
  stack_t other = {}, before_stack;
  other.ss_sp = signal_stack, other.ss_size = sizeof signal_stack;
  sigaltstack(&other, &before_stack);
  struct sigaction action = {}, before[2];
  action.sa_sigaction = fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &before[0]), sigaction(SIGBUS, &action, &before[1]);
  const uint64_t control = float_control();
  set_float_control(control | FLUSH);
  const bool failed = sigsetjmp(way_out, 1);
  if (!failed) run_grid(grid, dynamic, how);
  current = nullptr;
  set_float_control(control);
  sigaction(SIGSEGV, &before[0], nullptr), sigaction(SIGBUS, &before[1], nullptr);
  sigaltstack(&before_stack, nullptr);
  return failed ? sentence : nullptr;
}
