// Compiled without sanitizers: what the scheduler itself reads and writes is no kernel's business.
#include "scheduler.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>

// Defined where the program is linked with a sanitizer, null elsewhere.
#define METALORA_WEAK __attribute__((weak))
extern "C" {
METALORA_WEAK void* __tsan_get_current_fiber();
METALORA_WEAK void* __tsan_create_fiber(unsigned flags);
METALORA_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
METALORA_WEAK void __tsan_acquire(void* key);
METALORA_WEAK void __tsan_release(void* key);
METALORA_WEAK void __tsan_java_alloc(uintptr_t begin, uintptr_t bytes);
METALORA_WEAK void __sanitizer_start_switch_fiber(void** fake, const void* stack, size_t bytes);
METALORA_WEAK void __sanitizer_finish_switch_fiber(void* fake, const void** stack, size_t* bytes);
}

namespace metalora::shim {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kPoison = 0xFF;  // in every byte: a NaN in every floating-point type

void acquire(void* key) {
  if (__tsan_acquire) __tsan_acquire(key);
}

void release(void* key) {
  if (__tsan_release) __tsan_release(key);
}

// Shared memory as a new block finds it. ThreadSanitizer forgets what earlier blocks did to it: it
// has no plain call for that, but does the same for a new object on Java's heap.
void renew(char* begin, size_t bytes) {
  if (bytes == 0) return;
  if (__tsan_java_alloc) __tsan_java_alloc(reinterpret_cast<uintptr_t>(begin), bytes);
  std::memset(begin, kPoison, bytes);
}

// Where kernels' `__shared__` variables are: beside this one among the library's thread-local ones.
thread_local volatile char beside_shared;

struct StaticShared {
  char* begin = nullptr;
  size_t bytes = 0;
};

int find_static_shared(dl_phdr_info* module, size_t, void* result) {
  Dl_info own;
  dladdr(reinterpret_cast<void*>(&find_static_shared), &own);
  if (reinterpret_cast<void*>(module->dlpi_addr) != own.dli_fbase) return 0;
  for (int i = 0; i < module->dlpi_phnum; ++i)
    if (module->dlpi_phdr[i].p_type == PT_TLS && module->dlpi_tls_data)
      *static_cast<StaticShared*>(result) = {static_cast<char*>(module->dlpi_tls_data),
                                             module->dlpi_phdr[i].p_memsz};
  return 1;
}

// A barrier. Members are at most one generation apart, so two of everything are enough.
struct Meeting {
  unsigned generation = 0;
  int arrived = 0;
  std::source_location where;  // of the first to arrive
  char keys[2];                // ThreadSanitizer orders by address
};

struct WarpMeeting : Meeting {
  uint32_t lanes[2] = {};
  Slot slots[2][kWarp];
};

struct Warp {
  uint32_t alive = 0;
  std::map<uint32_t, WarpMeeting> meetings;  // by mask
};

struct Block {
  int alive = 0;
  Meeting meeting;
  std::vector<Warp> warps;
};

struct Cancelled {};

struct Fiber {
  void* place[5];        // where it left off
  ucontext_t beginning;  // on its stack
  bool begun = false;
  void* stack = nullptr;  // [kStack]
  void* tsan = nullptr;
  void* asan = nullptr;
  Position position;
  Warp* warp;
  AsyncCopies copies;
  bool ended = true;
  const Meeting* waits = nullptr;
  unsigned generation;
  std::source_location where;

  bool ready() const { return !ended && (!waits || waits->generation != generation); }
};

struct Scheduler {
  std::mutex mutex;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* running = nullptr;
  Fiber host;  // the thread that launches
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
  char start_key, end_key;

  const std::function<void()>* body;
  std::vector<std::unique_ptr<Block>> blocks;  // of this launch, the last of which runs
  char* shared;
  std::string removed_barrier;
  bool cancelled;
  std::exception_ptr error;
};

Scheduler scheduler;

// The compiler's own jumps: libc's switches ask the kernel for the signal mask, and sanitizers
// replace them.
[[noreturn]] __attribute__((noinline)) void jump_to(Fiber& fiber) {
  if (fiber.begun) __builtin_longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.beginning);
  std::abort();
}

__attribute__((noinline)) void jump(Fiber& from, Fiber& to) {
  if (__builtin_setjmp(from.place) == 0) jump_to(to);
}

void arrived_on(Fiber& fiber) {
  if (!__sanitizer_finish_switch_fiber) return;
  const bool from_host = &fiber != &scheduler.host;
  __sanitizer_finish_switch_fiber(fiber.asan, from_host ? &scheduler.host_stack : nullptr,
                                  from_host ? &scheduler.host_stack_bytes : nullptr);
}

void switch_between(Fiber& from, Fiber& to) {
  const bool home = &to == &scheduler.host;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&from.asan, home ? scheduler.host_stack : to.stack,
                                   home ? scheduler.host_stack_bytes : kStack);
  constexpr unsigned kNoOrder = 1;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, kNoOrder);
  jump(from, to);
  arrived_on(from);
}

void resume(Fiber& fiber) {
  scheduler.running = &fiber;
  switch_between(scheduler.host, fiber);
}

void advance(Meeting& meeting, int members) {
  if (meeting.arrived == 0 || meeting.arrived < members) return;
  meeting.arrived = 0;
  ++meeting.generation;
}

int members(const Warp& warp, uint32_t mask) { return __builtin_popcount(warp.alive & mask); }

std::string text(const std::source_location& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

// Waits for `members` of the meeting. With `ordered`, what each did before comes before what all
// do after.
void meet(Meeting& meeting, int members, bool ordered, std::source_location where) {
  Fiber& self = *scheduler.running;
  if (meeting.arrived == 0) meeting.where = where;
  if (meeting.where.line() != where.line())
    throw std::runtime_error("threads meet in different places: " + text(meeting.where) + " and " +
                             text(where));
  self.generation = meeting.generation;
  char* key = &meeting.keys[meeting.generation % 2];
  if (ordered) release(key);
  ++meeting.arrived;
  self.where = where;
  advance(meeting, members);
  self.waits = &meeting;
  while (!self.ready()) {
    switch_between(self, scheduler.host);
    if (scheduler.cancelled) throw Cancelled();
  }
  self.waits = nullptr;
  if (ordered) acquire(key);
}

void leave(Fiber& fiber) {
  Block& block = *scheduler.blocks.back();
  fiber.ended = true;
  fiber.waits = nullptr;
  advance(block.meeting, --block.alive);
  fiber.warp->alive &= ~(1u << fiber.position.lane);
  for (auto& [mask, meeting] : fiber.warp->meetings) advance(meeting, members(*fiber.warp, mask));
}

void live() {
  for (;;) {
    Fiber& self = *scheduler.running;
    acquire(&scheduler.start_key);
    self.copies = {};
    try {
      (*scheduler.body)();
    } catch (const Cancelled&) {
    } catch (...) {
      if (!scheduler.error) scheduler.error = std::current_exception();
    }
    release(&scheduler.end_key);
    leave(self);
    switch_between(self, scheduler.host);
  }
}

void begin() {
  arrived_on(*scheduler.running);
  live();
}

std::unique_ptr<Fiber> make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));  // below the stack: a guard
  void* pages = mmap(nullptr, page + kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages, page, PROT_NONE)) throw std::bad_alloc();
  fiber->stack = static_cast<char*>(pages) + page;
  getcontext(&fiber->beginning);
  fiber->beginning.uc_stack.ss_sp = fiber->stack;
  fiber->beginning.uc_stack.ss_size = kStack;
  makecontext(&fiber->beginning, begin, 0);
  if (__tsan_create_fiber) fiber->tsan = __tsan_create_fiber(0);
  return fiber;
}

std::string deadlock(const std::vector<Fiber*>& threads) {
  std::map<std::string, int> waiting;
  for (const Fiber* thread : threads)
    if (!thread->ended) ++waiting[text(thread->where)];
  std::ostringstream message;
  message << "threads wait for ever";
  const char* comma = ": ";
  for (const auto& [where, count] : waiting) {
    message << comma << count << " at " << where;
    comma = ", ";
  }
  return message.str();
}

void run_block(uint3 block, dim3 blocks, dim3 size, size_t number, bool reverse) {
  const size_t count = size_t{size.x} * size.y * size.z;
  Block& made = *scheduler.blocks.emplace_back(std::make_unique<Block>());
  made.alive = static_cast<int>(count);
  made.warps.resize((count + kWarp - 1) / kWarp);
  std::vector<Fiber*> threads;
  for (size_t i = 0; i < count; ++i) {
    // Thread i of another block is another fiber: they, too, may not write to the same place.
    Fiber& fiber = *scheduler.fibers[(i + number) % count];
    const auto x = static_cast<unsigned>(i % size.x), rest = static_cast<unsigned>(i / size.x);
    const int lane = static_cast<int>(i % kWarp);
    fiber.position = {{x, rest % size.y, rest / size.y}, block, size, blocks, lane};
    fiber.warp = &made.warps[i / kWarp];
    fiber.warp->alive |= 1u << lane;
    fiber.ended = false;
    threads.push_back(&fiber);
  }
  if (reverse) std::reverse(threads.begin(), threads.end());
  release(&scheduler.start_key);
  scheduler.cancelled = false;
  for (bool moved = true; moved;) {
    moved = false;
    for (Fiber* thread : threads)
      if (thread->ready()) {
        resume(*thread);
        moved = true;
      }
  }
  if (made.alive == 0) return;
  if (!scheduler.error)
    scheduler.error = std::make_exception_ptr(std::runtime_error(deadlock(threads)));
  scheduler.cancelled = true;
  for (Fiber* thread : threads)
    if (!thread->ended) resume(*thread);
}

bool removed(const std::source_location& barrier) {
  return !scheduler.removed_barrier.empty() && text(barrier) == scheduler.removed_barrier;
}

WarpMeeting& warp_meeting(uint32_t mask) {
  const Fiber& self = *scheduler.running;
  if (!(mask >> self.position.lane & 1))
    throw std::runtime_error("a thread's own lane must be in the mask");
  return self.warp->meetings[mask];
}

[[noreturn]] void refuse(const char* kernel, const char* what, size_t most, size_t got) {
  std::ostringstream message;
  message << kernel << ": " << what << " must be at most " << most << ", got " << got;
  throw std::runtime_error(message.str());
}

}  // namespace

const Position& position() { return scheduler.running->position; }

void* shared_memory() { return scheduler.shared; }

AsyncCopies& async_copies() { return scheduler.running->copies; }

Slot Exchanged::operator[](int lane) const { return slots[lane]; }

void wait_block(std::source_location where) {
  if (removed(where)) return;
  Block& block = *scheduler.blocks.back();
  meet(block.meeting, block.alive, true, where);
}

void wait_warp(uint32_t mask, std::source_location where) {
  if (removed(where)) return;
  meet(warp_meeting(mask), members(*scheduler.running->warp, mask), true, where);
}

Exchanged exchange(uint32_t mask, const Slot& value, std::source_location where) {
  WarpMeeting& meeting = warp_meeting(mask);
  const unsigned side = meeting.generation % 2;
  const int lane = position().lane;
  if (meeting.arrived == 0) meeting.lanes[side] = 0;
  meeting.lanes[side] |= 1u << lane;
  meeting.slots[side][lane] = value;
  meet(meeting, members(*scheduler.running->warp, mask), false, where);
  return {meeting.slots[side], meeting.lanes[side]};
}

namespace {
std::string record;
}

void note(const std::string& line) { record += line + "\n"; }

void launch(const char* kernel, dim3 blocks, dim3 threads, size_t shared_bytes,
            const std::function<void()>& body) {
  const std::lock_guard lock(scheduler.mutex);
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  const size_t grid = size_t{blocks.x} * blocks.y * blocks.z;
  StaticShared static_shared;
  beside_shared = 0;  // a library has no thread-local variables before the first is used
  dl_iterate_phdr(find_static_shared, &static_shared);
  if (count == 0 || grid == 0) throw std::runtime_error(std::string(kernel) + ": empty launch");
  if (count > kMostThreads) refuse(kernel, "threads per block", kMostThreads, count);
  if (shared_bytes > kMostShared) refuse(kernel, "shared memory", kMostShared, shared_bytes);
  if (std::max(blocks.y, blocks.z) > 65535)
    refuse(kernel, "blocks in y and z", 65535, std::max(blocks.y, blocks.z));
  if (blocks.x > 0x7FFFFFFF) refuse(kernel, "blocks in x", 0x7FFFFFFF, blocks.x);
  note(kernel);

  const char* order = std::getenv("METALORA_SHIM_ORDER");
  const bool reverse = order && std::strcmp(order, "reverse") == 0;
  const char* barrier = std::getenv("METALORA_SHIM_WITHOUT_BARRIER");
  scheduler.removed_barrier = barrier ? barrier : "";
  while (scheduler.fibers.size() < count) scheduler.fibers.push_back(make_fiber());
  scheduler.host.begun = true;
  if (__tsan_get_current_fiber) scheduler.host.tsan = __tsan_get_current_fiber();
  const auto shared = std::unique_ptr<char, decltype(&std::free)>(
      static_cast<char*>(std::malloc(shared_bytes)), &std::free);
  scheduler.shared = shared.get();
  scheduler.body = &body;
  scheduler.error = nullptr;
  for (size_t i = 0; i < grid && !scheduler.error; ++i) {
    const size_t b = reverse ? grid - 1 - i : i;
    renew(scheduler.shared, shared_bytes);
    renew(static_shared.begin, static_shared.bytes);
    const uint3 block = {static_cast<unsigned>(b % blocks.x),
                         static_cast<unsigned>(b / blocks.x % blocks.y),
                         static_cast<unsigned>(b / blocks.x / blocks.y)};
    run_block(block, blocks, threads, i, reverse);
    if (!scheduler.error) continue;
    acquire(&scheduler.end_key);
    scheduler.blocks.clear();
    try {
      std::rethrow_exception(scheduler.error);
    } catch (const std::exception& error) {
      std::ostringstream message;
      message << kernel << ", block (" << block.x << ", " << block.y << ", " << block.z
              << "): " << error.what();
      throw std::runtime_error(message.str());
    }
  }
  acquire(&scheduler.end_key);
  scheduler.blocks.clear();
}

}  // namespace metalora::shim

const char* metalora_shim_record() { return metalora::shim::record.c_str(); }

void metalora_shim_clear_record() { metalora::shim::record.clear(); }
