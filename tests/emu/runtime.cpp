// Runs a kernel on the CPU: each CUDA thread is a fiber, and one thread of the system runs them in turn, each until it
// waits for others. Several blocks may be resident, so that blocks that wait for each other can go on.
//
// Stricter than CUDA: a warp operation may not name a lane that has returned or does not exist, and all threads of a
// block, or of a shuffle or vote, must wait at the same line. What it does not see: speed, bank conflicts, weak memory
// ordering (any fence orders with every other), and threads that wait for memory without __nanosleep().
#include "runtime.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"

namespace emu {

Position here;

namespace {

constexpr int warp_size = 32;
constexpr size_t arena_bytes = 1 << 20, red_zone = 64;
constexpr int idle_passes_allowed = 10000;
// Of a warp that waits for a value in memory: the most times that a lane is run from one __nanosleep() to the next. In
// between it may exchange what the lanes have seen.
constexpr int runs_of_a_wait = 8;

enum class State { ready, at_barrier, at_exchange, done };

struct Block;

struct Thread {
  Fiber fiber;
  Block *block = nullptr;
  uint3 index{};
  int number = 0;
  State state = State::done;
  Site site{};   // where it waits, or waited last
  int runs = 0;  // since its last __nanosleep(), or many

  // The warp operation that it takes part in.
  WarpCall call{};
  bool predicate = false;
  alignas(16) unsigned char value[16], result[16];
  unsigned int ballot = 0;

  // cp.async: copies that it has started and that have not been made, and the number of the open group.
  std::vector<Copy> copies;
  int group = 0;

  int lane() const { return number % warp_size; }
  int warp_start() const { return number - lane(); }
};

// What __syncwarp() of one mask in one warp orders memory by: two objects in turn, as an early arrival at the next one
// must not order a late leaver of this one. Each lane counts its own calls.
struct WarpOrder {
  int warp_start;
  unsigned int mask;
  unsigned char turn[warp_size];
  long object[2];
};

struct SharedVariable {
  const void *key;
  const char *name;
  char *data;
  size_t bytes;
};

struct Block {
  uint3 index{};
  std::vector<Thread *> threads;
  int live = 0;

  int waiting = 0, nonzero = 0;
  unsigned int generation = 0;
  Votes votes{};
  long barrier_order[2]{};
  std::deque<WarpOrder> warp_orders;

  char *arena = map_memory(arena_bytes);
  size_t used = 0, shared_bytes = 0;
  std::vector<SharedVariable> variables;

  Block() = default;
  Block(const Block &) = delete;
  ~Block() {
    unpoison(arena, arena_bytes);
    unmap_memory(arena, arena_bytes);
  }
  bool holds(const void *p) const { return (char *)p >= arena && (char *)p < arena + arena_bytes; }
};

struct Options {
  unsigned int grid[3], block[3];
  size_t dynamic_shared, shared_limit;
  int order, resident;
};

// The launch that is going on.
struct Launch {
  const Kernel *kernel = nullptr;
  void **arguments = nullptr;
  Options options{};
  Thread *current = nullptr;  // null: the caller
  Fiber caller;
  std::vector<Block *> resident;
  std::vector<std::vector<Thread *>> threads;  // by resident block; reused by the blocks of a launch
  std::vector<uint64_t> block_order;
  size_t next_block = 0;
  int idle_passes = 0;
  uint64_t random_state = 1;
  std::string error;
  long finished = 0, fence = 0;  // their addresses order memory
  sigjmp_buf on_fault;
} launching;

std::string name_of(uint3 block, uint3 thread) {
  char text[120];
  snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u)", block.x, block.y, block.z, thread.x, thread.y,
           thread.z);
  return text;
}

std::string place(const Thread &t) {
  const std::string name = name_of(t.block->index, t.index);
  return name + " at " + (t.site.file ? t.site.file + (":" + std::to_string(t.site.line)) : "its start");
}

void record(const std::string &message) {
  if (!launching.error.empty()) return;
  launching.error = std::string(launching.kernel->name) + ": " + message;
}

void run_caller(Thread *from, bool for_good) {
  launching.current = nullptr;
  Fiber::change(from->fiber, launching.caller, for_good);
}

[[noreturn]] void abandon(Thread *thread) {
  run_caller(thread, true);
  abort();
}

// Lets others run until this thread is ready and its turn has come.
void wait(Thread *thread) { run_caller(thread, false); }

std::string format(const char *text, va_list arguments) {
  char message[1000];
  vsnprintf(message, sizeof message, text, arguments);
  return message;
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)); }

void release_barrier_if_complete(Block *b) {
  if (!b->waiting || b->waiting != b->live) return;
  const Thread *first = nullptr;
  for (Thread *t : b->threads) {
    if (t->state != State::at_barrier) continue;
    if (!first) first = t;
    if (!same(t->site, first->site)) {
      record("threads of one block wait at different barriers: " + place(*first) + ", " + place(*t));
      return;
    }
  }
  b->votes = {b->waiting, b->nonzero};
  b->waiting = b->nonzero = 0;
  b->generation++;
  for (Thread *t : b->threads)
    if (t->state == State::at_barrier) t->state = State::ready;
}

// ---------------------------------------------------------------------------------------------------------------------
// Warps

const char *name_of(WarpOp op) {
  switch (op) {
    case WarpOp::shuffle:
      return "__shfl_sync";
    case WarpOp::shuffle_up:
      return "__shfl_up_sync";
    case WarpOp::shuffle_down:
      return "__shfl_down_sync";
    case WarpOp::shuffle_xor:
      return "__shfl_xor_sync";
    case WarpOp::ballot:
      return "__ballot_sync";
    case WarpOp::any:
      return "__any_sync";
    case WarpOp::all:
      return "__all_sync";
    case WarpOp::sync:
      return "__syncwarp";
  }
  return "?";
}
bool is_shuffle(WarpOp op) { return op <= WarpOp::shuffle_xor; }
bool names(unsigned int mask, int lane) { return mask >> lane & 1; }

// The lane that gives its value to `lane`.
int source_lane(const WarpCall &call, int lane) {
  const int segment = lane & ~(call.width - 1), end = segment + call.width;
  int from = lane;
  switch (call.op) {
    case WarpOp::shuffle:
      return segment + (call.argument & (call.width - 1));
    case WarpOp::shuffle_up:
      from = lane - call.argument;
      break;
    case WarpOp::shuffle_down:
      from = lane + call.argument;
      break;
    case WarpOp::shuffle_xor:
      from = lane ^ call.argument;
      break;
    default:
      break;
  }
  if (call.op == WarpOp::shuffle_up) return from < segment ? lane : from;
  return from >= end ? lane : from;
}

// Whether all lanes of the mask have come to the operation.
bool all_arrived(const Thread &mine) {
  const Block &b = *mine.block;
  bool all = true;
  for (int lane = 0; lane < warp_size; lane++) {
    if (!names(mine.call.mask, lane)) continue;
    const char *op = name_of(mine.call.op);
    if (mine.warp_start() + lane >= (int)b.threads.size())
      fail(mine.site, "the mask 0x%08x of %s names lane %d, which does not exist", mine.call.mask, op, lane);
    const Thread &other = *b.threads[mine.warp_start() + lane];
    if (other.state == State::done)
      fail(mine.site, "the mask 0x%08x of %s names lane %d, which has returned", mine.call.mask, op, lane);
    // One that waits elsewhere for others may still come here.
    if (other.state != State::at_exchange || !names(other.call.mask, mine.lane())) {
      all = false;
      continue;
    }
    const bool same_call = other.call.op == mine.call.op && other.call.mask == mine.call.mask;
    const bool same_line = same(other.site, mine.site) || mine.call.op == WarpOp::sync;
    if (!same_call || !same_line)
      fail(mine.site, "%s with mask 0x%08x meets %s with mask 0x%08x of %s", op, mine.call.mask, name_of(other.call.op),
           other.call.mask, place(other).c_str());
  }
  return all;
}

void complete_exchange(Thread &mine) {
  const auto &threads = mine.block->threads;
  const int start = mine.warp_start();
  unsigned int ballot = 0;
  for (int lane = 0; lane < warp_size; lane++)
    if (names(mine.call.mask, lane) && threads[start + lane]->predicate) ballot |= 1u << lane;
  for (int lane = 0; lane < warp_size; lane++) {
    if (!names(mine.call.mask, lane)) continue;
    Thread &t = *threads[start + lane];
    t.ballot = ballot;
    t.state = State::ready;
    if (!is_shuffle(t.call.op)) continue;
    const int from = source_lane(t.call, lane);
    if (!names(t.call.mask, from))
      fail(mine.site, "%s: lane %d reads lane %d, which is not in the mask 0x%08x", name_of(t.call.op), lane, from,
           t.call.mask);
    memcpy(t.result, threads[start + from]->value, sizeof t.result);
  }
}

void meet(Thread &mine) {
  const char *op = name_of(mine.call.op);
  const int width = mine.call.width;
  if (!names(mine.call.mask, mine.lane()))
    fail(mine.site, "%s: the calling lane %d is not in its own mask 0x%08x", op, mine.lane(), mine.call.mask);
  if (width < 1 || width > warp_size || (width & (width - 1)))
    fail(mine.site, "%s: the width is %d; it must be a power of two up to 32", op, width);
  mine.state = State::at_exchange;
  if (all_arrived(mine)) complete_exchange(mine);
  wait(&mine);
}

WarpOrder &order_of(Thread &mine) {
  const Unobserved unobserved;  // its memory is released by another thread
  for (WarpOrder &order : mine.block->warp_orders)
    if (order.warp_start == mine.warp_start() && order.mask == mine.call.mask) return order;
  mine.block->warp_orders.push_back({mine.warp_start(), mine.call.mask, {}, {}});
  return mine.block->warp_orders.back();
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory

// Unwritten memory holds 0xff: NaN in every floating-point format, -1 as a number.
char *carve(Block *b, const void *key, const char *name, size_t bytes, size_t alignment, size_t phase = 0) {
  const Unobserved unobserved;
  const size_t start = (b->used + red_zone + alignment - 1) / alignment * alignment + phase;
  const size_t end = start + bytes + red_zone;
  if (end > arena_bytes) fail(launching.current->site, "%s: the emulation has too little shared memory", name);
  unpoison(b->arena + b->used, end - b->used);
  memset(b->arena + b->used, 0xff, end - b->used);
  poison(b->arena + b->used, start - b->used);
  poison(b->arena + start + bytes, end - start - bytes);
  b->used = start + bytes;
  b->shared_bytes += (bytes + 15) / 16 * 16;
  b->variables.push_back({key, name, b->arena + start, bytes});
  return b->arena + start;
}

SharedVariable *find_variable(Block *b, const void *key) {
  for (SharedVariable &v : b->variables)
    if (v.key == key) return &v;
  return nullptr;
}

// Without AddressSanitizer, what was written beside a variable is found when its block ends.
void check_red_zones(const Block &b) {
#if !defined(EMU_ASAN)
  const unsigned char *p = (const unsigned char *)b.arena;
  for (const SharedVariable &v : b.variables) {
    for (; p < (const unsigned char *)v.data; p++)
      if (*p != 0xff) record(std::string("something was written before the shared memory of ") + v.name);
    p = (const unsigned char *)v.data + v.bytes;
    for (size_t i = 0; i < red_zone; i++)
      if (p[i] != 0xff) {
        char where[200];
        snprintf(where, sizeof where, " of block (%u,%u,%u), %zu bytes past its %zu", b.index.x, b.index.y, b.index.z,
                 i, v.bytes);
        record(std::string("something was written past the end of the shared memory ") + v.name + where);
      }
  }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads and blocks

void thread_main() {
  Fiber::arrive(launching.caller);
  Thread *mine = launching.current;
  launching.kernel->run(launching.arguments);
  if (!mine->copies.empty()) fail(mine->site, "a thread returns before it has waited for its cp.async copies");
  release(&launching.finished);
  mine->state = State::done;
  mine->block->live--;
  release_barrier_if_complete(mine->block);  // others may wait for those only that have not returned
  abandon(mine);
}

uint64_t random_number() {
  uint64_t &x = launching.random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}
bool is_random() { return launching.options.order > 1; }
bool is_descending() { return launching.options.order == 1; }
template <class T>
void shuffle(std::vector<T> &items) {
  for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[random_number() % i]);
}

void start_thread(Thread *t, Block *b, int number) {
  const unsigned int *size = launching.options.block, n = number;
  t->block = b;
  t->number = number;
  t->index = {n % size[0], n / size[0] % size[1], n / size[0] / size[1]};
  t->state = State::ready;
  t->site = {};
  t->runs = runs_of_a_wait + 1;
  t->copies.clear();
  t->group = 0;
  t->fiber.prepare(thread_main);
#if defined(EMU_TSAN)
  t->fiber.call_it(name_of(b->index, t->index).c_str());
#endif
}

Block *start_block(uint64_t number, std::vector<Thread *> &threads) {
  const unsigned int *grid = launching.options.grid;
  const size_t n = launching.options.block[0] * launching.options.block[1] * launching.options.block[2];
  Block *b = new Block;
  b->index = {unsigned(number % grid[0]), unsigned(number / grid[0] % grid[1]), unsigned(number / grid[0] / grid[1])};
  poison(b->arena, arena_bytes);
  while (threads.size() < n) threads.push_back(new Thread);
  b->threads.assign(threads.begin(), threads.begin() + n);
  b->live = int(n);
  for (size_t i = 0; i < n; i++) start_thread(b->threads[i], b, int(i));
  return b;
}

// Runs each thread of the block that is ready until it waits; in random orders, those of about half of the warps.
struct Pass {
  bool moved = false, skipped = false, all_spin = true;
};
void run_block(Block *b, Pass &pass) {
  std::vector<Thread *> ready;
  uint64_t skip = is_random() ? random_number() : 0;
  for (Thread *t : b->threads) {
    if (t->state != State::ready) continue;
    if (skip >> (t->number / warp_size) & 1)
      pass.skipped = true;
    else
      ready.push_back(t);
  }
  if (is_descending()) std::reverse(ready.begin(), ready.end());
  if (is_random()) shuffle(ready);
  for (Thread *t : ready) {
    t->runs += t->runs <= runs_of_a_wait;
    launching.current = t;
    here.thread = t->index;
    here.block = b->index;
    Fiber::change(launching.caller, t->fiber);
    if (!launching.error.empty()) return;
    pass.moved = true;
    pass.all_spin &= t->runs <= runs_of_a_wait;
  }
}

std::string what_it_waits_for(const Thread &t) {
  if (t.state == State::at_barrier) return "__syncthreads";
  unsigned int missing = 0;
  for (int lane = 0; lane < warp_size; lane++)
    if (names(t.call.mask, lane)) {
      const Thread &other = *t.block->threads[t.warp_start() + lane];
      if (other.state != State::at_exchange || other.call.op != t.call.op) missing |= 1u << lane;
    }
  char text[100];
  snprintf(text, sizeof text, "%s for the lanes 0x%08x", name_of(t.call.op), missing);
  return text;
}

void report_deadlock() {
  std::map<std::string, std::pair<int, const Thread *>> waiting;  // for what: how many, and the first of them
  for (const Block *b : launching.resident) {
    if (!b) continue;
    for (const Thread *t : b->threads) {
      if (t->state == State::done) continue;
      const std::string what = what_it_waits_for(*t) + " at " + t->site.file + ":" + std::to_string(t->site.line);
      auto &entry = waiting.try_emplace(what, 0, t).first->second;
      entry.first++;
    }
  }
  std::string message = "deadlock; no thread can go on:";
  int named = 0;
  for (const auto &[what, who] : waiting) {
    if (named++ == 6) {
      message += " and others";
      break;
    }
    message += " " + std::to_string(who.first) + " threads wait at " + what_it_waits_for(*who.second) + " such as " +
               place(*who.second) + ";";
  }
  record(message);
}

void fill_resident() {
  for (size_t i = 0; i < launching.resident.size(); i++) {
    Block *&b = launching.resident[i];
    if (b && b->live) continue;
    if (b) check_red_zones(*b);
    delete b;
    b = nullptr;
    if (launching.next_block < launching.block_order.size())
      b = start_block(launching.block_order[launching.next_block++], launching.threads[i]);
  }
  std::vector<Block *> left;
  for (Block *b : launching.resident)
    if (b) left.push_back(b);
  if (left.empty()) launching.resident.clear();
}

void run_grid() {
  launching.resident.assign(launching.options.resident, nullptr);
  while (launching.threads.size() < launching.resident.size()) launching.threads.emplace_back();
  for (fill_resident(); !launching.resident.empty() && launching.error.empty(); fill_resident()) {
    Pass pass;
    for (Block *b : launching.resident)
      if (b && launching.error.empty()) run_block(b, pass);
    if (!launching.error.empty()) break;
    if (!pass.moved && !pass.skipped) report_deadlock();
    const bool idle = pass.moved && pass.all_spin;
    launching.idle_passes = idle ? launching.idle_passes + 1 : pass.moved ? 0 : launching.idle_passes;
    if (launching.idle_passes > idle_passes_allowed)
      record(
          "no progress: every thread that can run waits for a value in memory; it is never written, or by a block "
          "that comes later");
  }
}

void order_blocks() {
  const unsigned int *grid = launching.options.grid;
  auto &order = launching.block_order;
  order.resize(uint64_t(grid[0]) * grid[1] * grid[2]);
  for (size_t i = 0; i < order.size(); i++) order[i] = is_descending() ? order.size() - 1 - i : i;
  if (is_random()) shuffle(order);
}

// ---------------------------------------------------------------------------------------------------------------------
// Faults. AddressSanitizer and ThreadSanitizer have their own handlers; the former is not told of threads.

#if defined(EMU_ASAN)
void on_report(const char *) {
  if (launching.current)
    fprintf(stderr, "in %s, %s or later\n", launching.kernel->name, place(*launching.current).c_str());
}
#endif

#if !defined(EMU_ASAN) && !defined(EMU_TSAN)
constexpr int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

void on_signal(int number, siginfo_t *info, void *) {
  Thread *t = launching.current;
  if (!t) {  // not a kernel's fault
    signal(number, SIG_DFL);
    return;
  }
  char what[100];
  if (t->fiber.in_guard(info->si_addr))
    snprintf(what, sizeof what, "stack overflow");
  else
    snprintf(what, sizeof what, "illegal access or instruction (%s, address %p)", strsignal(number), info->si_addr);
  record(std::string(what) + " in " + place(*t) + " or later");
  siglongjmp(launching.on_fault, 1);
}

class FaultHandlers {
 public:
  FaultHandlers() {
    static char stack[64 << 10];
    stack_t alternative{};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < n; i++) sigaction(signals[i], &action, &old_[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < n; i++) sigaction(signals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int n = sizeof signals / sizeof *signals;
  struct sigaction old_[n];
  stack_t old_stack_{};
};
#else
struct FaultHandlers {
  FaultHandlers() {}
};
#endif

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// What runtime.h declares

void fail(Site site, const char *text, ...) {
  va_list arguments;
  va_start(arguments, text);
  std::string message = format(text, arguments);
  va_end(arguments);
  Thread *mine = launching.current;
  if (!mine) {
    fprintf(stderr, "%s:%d: %s, outside of a kernel\n", site.file, site.line, message.c_str());
    abort();
  }
  if (site.file) mine->site = site;
  record(message + " in " + place(*mine));
  abandon(mine);
}

Votes barrier(Site site, bool predicate) {
  Thread *mine = launching.current;
  Block *b = mine->block;
  long *order = &b->barrier_order[b->generation & 1];
  release(order);
  mine->site = site;
  mine->state = State::at_barrier;
  b->waiting++;
  b->nonzero += predicate;
  release_barrier_if_complete(b);
  wait(mine);
  acquire(order);
  return b->votes;
}

int place_of_warp() {
  const Thread *mine = launching.current;
  const int warps = (int(mine->block->threads.size()) + warp_size - 1) / warp_size;
  return launching.options.order * 4 + int(mine->block->index.x) * warps + mine->number / warp_size;
}

void exchange(Site site, WarpCall call, const void *value, void *result, size bytes) {
  Thread &mine = *launching.current;
  mine.site = site;
  mine.call = call;
  if (bytes) memcpy(mine.value, value, bytes);
  long *order = nullptr;
  if (call.op == WarpOp::sync) {  // the only one that orders memory
    WarpOrder &o = order_of(mine);
    order = &o.object[o.turn[mine.lane()]++ & 1];
    release(order);
  }
  meet(mine);
  if (bytes) memcpy(result, mine.result, bytes);
  if (order) acquire(order);
}

unsigned int vote(Site site, WarpCall call, bool predicate) {
  Thread &mine = *launching.current;
  mine.site = site;
  mine.call = call;
  mine.predicate = predicate;
  meet(mine);
  switch (call.op) {
    case WarpOp::any:
      return mine.ballot != 0;
    case WarpOp::all:
      return mine.ballot == call.mask;
    default:
      return mine.ballot;
  }
}

void *shared_memory(const void *key, const char *name, size bytes, size alignment) {
  Thread *mine = launching.current;
  if (!mine) fail({}, "__shared__ %s", name);
  Block *b = mine->block;
  if (SharedVariable *v = find_variable(b, key)) return v->data;
  char *data = carve(b, key, name, bytes, alignment < 16 ? 16 : alignment);
  const size_t total = b->shared_bytes + (find_variable(b, &here) ? 0 : launching.options.dynamic_shared);
  if (total > launching.options.shared_limit)
    fail(mine->site, "%s: %zu bytes of shared memory are in use, where %zu are allowed", name, total,
         launching.options.shared_limit);
  return data;
}

void *dynamic_shared_memory(Site site) {
  Block *b = launching.current->block;
  if (SharedVariable *v = find_variable(b, &here)) return v->data;
  launching.current->site = site;
  // CUDA promises an alignment of 16 and no more.
  return carve(b, &here, "given at the launch", launching.options.dynamic_shared, 32, 16);
}

void check_address(Site site, const void *p, size alignment, Space space) {
  const Thread *mine = launching.current;
  if ((uintptr_t)p % alignment) fail(site, "misaligned address %p; it must be a multiple of %zu", p, alignment);
  bool shared = false;
  for (const Block *b : launching.resident) shared |= b && b->holds(p);
  const bool right = space == Space::shared ? mine->block->holds(p) : !shared && !mine->fiber.on_stack(p);
  if (!right) fail(site, "address %p is not in %s memory", p, space == Space::shared ? "the block's shared" : "global");
}

bool start_copy(Site site, Copy copy) {
  Thread *mine = launching.current;
  if (copy.bytes != 4 && copy.bytes != 8 && copy.bytes != 16) fail(site, "cp.async of %d bytes", copy.bytes);
  check_address(site, copy.to, copy.bytes, Space::shared);
  check_address(site, copy.from, copy.bytes, Space::global);
  mine->site = site;
  if (launching.options.order & 1) return true;  // as early as the hardware may; else as late
  copy.group = mine->group;
  mine->copies.push_back(copy);
  return false;
}
void commit_copies() { launching.current->group++; }
bool next_copy(int groups_to_leave, Copy *copy) {
  Thread *mine = launching.current;
  if (mine->copies.empty() || mine->copies.front().group >= mine->group - groups_to_leave) return false;
  *copy = mine->copies.front();
  mine->copies.erase(mine->copies.begin());
  return true;
}

void fence() {
  acquire(&launching.fence);
  release(&launching.fence);
}

void let_others_run() {
  Thread *mine = launching.current;
  mine->runs = 0;
  wait(mine);
}

namespace {
// Returns null, or what went wrong.
const char *launch(const Kernel *kernel, const Options *options, void **arguments) {
  launching.kernel = kernel;
  launching.options = *options;
  launching.arguments = arguments;
  launching.error.clear();
  launching.next_block = launching.idle_passes = 0;
  launching.random_state = 88172645463325252ull + options->order;
  launching.current = nullptr;
  launching.caller.adopt();
  const unsigned int *grid = options->grid, *block = options->block;
  here.grid_size = dim3(grid[0], grid[1], grid[2]);
  here.block_size = dim3(block[0], block[1], block[2]);
  order_blocks();
  const FaultHandlers handlers;
#if defined(EMU_ASAN)
  __asan_set_error_report_callback(on_report);
#endif
  if (!sigsetjmp(launching.on_fault, 1)) run_grid();
  launching.current = nullptr;
  for (Block *b : launching.resident)
    for (size_t i = 0; b && i < b->threads.size(); i++)
      if (b->threads[i]->state != State::done) b->threads[i]->fiber.release_all(&launching.finished);
  acquire(&launching.finished);
  for (Block *b : launching.resident) delete b;
  launching.resident.clear();
  // A stack takes two of the mappings that a process may have, and every module has a copy of this file.
  for (auto &threads : launching.threads)
    for (Thread *t : threads) delete t;
  launching.threads.clear();
  return launching.error.empty() ? nullptr : launching.error.c_str();
}
}  // namespace
}  // namespace emu

extern "C" __attribute__((visibility("default"))) const char *emu_launch(const emu::Kernel *kernel,
                                                                         const emu::Options *options,
                                                                         void **arguments) {
  return emu::launch(kernel, options, arguments);
}
