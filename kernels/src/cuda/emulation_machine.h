// The machine behind the emulation: threads of a block as fibers on one operating-system thread, barriers, warp
// operations, shared memory, and the sentences for what a kernel does wrong. Knows nothing of CUDA's names.
//
// Invariant: whatever way a launch ends, the scheduler's stack is where it was, and the next launch works.
#pragma once

#undef _FORTIFY_SOURCE  // Its longjmp takes a jump between fibers' stacks for an error.

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 { unsigned x, y, z; };

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
constexpr cudaError_t cudaErrorLaunchFailure = 719;

namespace cluster::emulation {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t MAX_SHARED = 227 * 1024;
constexpr size_t STACK = 128 * 1024;
constexpr size_t GUARD = 4096;
// Written behind dynamic shared memory and looked for after each block.
constexpr size_t FENCE = 256;
constexpr unsigned char FENCE_BYTE = 0xa5;

enum class Operation { None, Sync, Index, Up, Down, Xor, Ballot, Any, All, MatchAny, Add, Min, Max, And, Or };
enum class Wait { Ready, Block, Warp, Done };

inline const char* name_of(Operation operation) {
    constexpr const char* NAMES[] = {"none", "__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                     "__shfl_xor_sync", "__ballot_sync", "__any_sync", "__all_sync",
                                     "__match_any_sync", "__reduce_add_sync", "__reduce_min_sync",
                                     "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync"};
    return NAMES[static_cast<int>(operation)];
}

// One CUDA thread. Its stack is kept from block to block and from launch to launch.
struct Thread {
    uint3 index{};
    unsigned linear = 0;
    Wait wait = Wait::Done;
    // Where it waits.
    Operation operation = Operation::None;
    unsigned mask = 0;
    int line = 0;
    int argument = 0;
    int width = WARP;
    uint64_t value = 0;
    uint64_t result = 0;
    char* stack = nullptr;
    bool begun = false;
    ucontext_t entry;
    jmp_buf context;
};

using Body = void (*)(void*);

class Machine {
  public:
    ~Machine() {
        for (Thread& thread : threads_)
            if (thread.stack) munmap(thread.stack, STACK + GUARD);
    }

    dim3 grid, block;
    uint3 block_index{};

    Thread& current() { return *current_; }
    unsigned char* dynamic_shared() { return shared_ + (-reinterpret_cast<uintptr_t>(shared_) & 127); }
    const std::string& message() const { return message_; }

    cudaError_t run(dim3 grid_size, dim3 block_size, size_t shared_bytes, Body body, void* argument) {
        const uint64_t threads = uint64_t{block_size.x} * block_size.y * block_size.z;
        const bool in_limits = threads >= 1 && threads <= MAX_THREADS && block_size.z <= 64 && grid_size.x >= 1 &&
                               grid_size.x <= 0x7fffffff && grid_size.y >= 1 && grid_size.y <= 65535 &&
                               grid_size.z >= 1 && grid_size.z <= 65535 && shared_bytes <= MAX_SHARED;
        if (!in_limits) return refuse(grid_size, block_size, shared_bytes);
        grid = grid_size;
        block = block_size;
        body_ = body;
        argument_ = argument;
        message_.clear();
        prepare(static_cast<unsigned>(threads), shared_bytes);
        ++launches_;
        uint64_t blocks = 0;
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; ++x) {
                    block_index = {x, y, z};
                    if (!run_block((launches_ + blocks++) % 2 == 0)) return cudaErrorLaunchFailure;
                }
        return cudaSuccess;
    }

    // Waits for all threads of the block; answers how many brought something other than zero.
    int block_barrier(int line, int value) {
        Thread& self = *current_;
        self.line = line;
        self.value = value != 0;
        self.wait = Wait::Block;
        if (++at_barrier_ < in_use_) return yield(), static_cast<int>(self.result);
        at_barrier_ = 0;
        unsigned count = 0;
        for (unsigned i = 0; i < in_use_; ++i) {
            const Thread& other = threads_[i];
            if (other.line != line)
                fail("thread " + std::to_string(self.linear) + " is at the barrier in line " + std::to_string(line) +
                     " where thread " + std::to_string(i) + " is at the one in line " + std::to_string(other.line));
            count += static_cast<unsigned>(other.value);
        }
        for (unsigned i = 0; i < in_use_; ++i) {
            threads_[i].result = count;
            threads_[i].wait = Wait::Ready;
        }
        return static_cast<int>(count);
    }

    // Waits for the lanes of `mask`. The last to arrive works out every lane's result.
    uint64_t warp(Operation operation, unsigned mask, uint64_t value, int argument, int width) {
        Thread& self = *current_;
        self.operation = operation;
        self.mask = mask;
        self.value = value;
        self.argument = argument;
        self.width = width;
        self.wait = Wait::Warp;
        const unsigned base = self.linear / WARP * WARP;
        if (!(mask >> (self.linear - base) & 1))
            fail("thread " + std::to_string(self.linear) + " is not in the mask of its own " + name_of(operation));
        for (unsigned i = 0; i < WARP; ++i) {
            // The lane that runs last comes first: mostly one look is enough to know that some are missing.
            const unsigned lane = forward_ ? WARP - 1 - i : i;
            if (!(mask >> lane & 1)) continue;
            if (base + lane >= in_use_)
                fail(std::string(name_of(operation)) + " waits for lane " + std::to_string(lane) +
                     ", which the block does not have: use a multiple of 32 threads");
            const Thread& other = threads_[base + lane];
            // A lane in another operation may be one of fewer lanes, and come here after it.
            if (other.wait != Wait::Warp || !same_operation(other, self)) return yield(), self.result;
        }
        for (unsigned lane = 0; lane < WARP; ++lane)
            if (mask >> lane & 1) threads_[base + lane].result = exchange(base, lane);
        for (unsigned lane = 0; lane < WARP; ++lane)
            if (mask >> lane & 1) threads_[base + lane].wait = Wait::Ready;
        return self.result;
    }

    // Ends the launch, from inside one of its threads; the process, from anywhere else.
    [[noreturn]] void fail(const std::string& reason) {
        if (!inside_) {
            fprintf(stderr, "cuda emulation: %s, outside a kernel\n", reason.c_str());
            abort();
        }
        message_ = reason + ", in block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) +
                   ", " + std::to_string(block_index.z) + ")";
        _longjmp(scheduler_, 2);
    }

    // Runs the body, over and over, on this fiber's stack.
    void fiber() {
        for (;;) {
            body_(argument_);
            current_->wait = Wait::Done;
            yield();
        }
    }

  private:
    std::vector<Thread> threads_;
    std::vector<unsigned char> shared_memory_;
    unsigned char* shared_ = nullptr;
    size_t shared_bytes_ = 0;
    unsigned in_use_ = 0;
    unsigned at_barrier_ = 0;
    bool forward_ = true;
    uint64_t launches_ = 0;
    bool inside_ = false;
    Thread* current_ = nullptr;
    jmp_buf scheduler_;
    Body body_ = nullptr;
    void* argument_ = nullptr;
    std::string message_;

    cudaError_t refuse(dim3 grid_size, dim3 block_size, size_t shared_bytes) {
        char text[200];
        snprintf(text, sizeof text,
                 "a device refuses a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads with %zu bytes of shared memory",
                 grid_size.x, grid_size.y, grid_size.z, block_size.x, block_size.y, block_size.z, shared_bytes);
        message_ = text;
        fprintf(stderr, "cuda emulation: %s\n", text);
        return cudaErrorInvalidConfiguration;
    }

    void prepare(unsigned threads, size_t shared_bytes) {
        if (threads_.empty()) threads_.resize(MAX_THREADS);
        if (shared_memory_.empty()) shared_memory_.resize(MAX_SHARED + 128 + FENCE);
        shared_ = shared_memory_.data();
        shared_bytes_ = shared_bytes;
        in_use_ = threads;
        for (unsigned i = 0; i < threads; ++i) {
            Thread& thread = threads_[i];
            thread.linear = i;
            thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        }
    }

    bool run_block(bool forward) {
        // What a block finds in shared memory is not its to use: make it NaN.
        memset(dynamic_shared(), 0xff, shared_bytes_);
        memset(dynamic_shared() + shared_bytes_, FENCE_BYTE, FENCE);
        for (unsigned i = 0; i < in_use_; ++i) threads_[i].wait = Wait::Ready;
        at_barrier_ = 0;
        forward_ = forward;
        // Changed between the jumps.
        volatile bool running = true;
        while (running) {
            volatile bool moved = false;
            volatile unsigned done = 0;
            for (volatile unsigned i = 0; i < in_use_; i = i + 1) {
                Thread& thread = threads_[forward ? i : in_use_ - 1 - i];
                if (thread.wait == Wait::Ready) {
                    moved = true;
                    if (!resume(thread)) return report();
                }
                if (thread.wait == Wait::Done) done = done + 1;
            }
            running = done < in_use_;
            if (running && !moved) {
                message_ = stuck();
                return report();
            }
        }
        const unsigned char* fence = dynamic_shared() + shared_bytes_;
        if (std::any_of(fence, fence + FENCE, [](unsigned char byte) { return byte != FENCE_BYTE; })) {
            message_ = "a block wrote behind its " + std::to_string(shared_bytes_) + " bytes of dynamic shared memory";
            return report();
        }
        return true;
    }

    // Runs a thread until it waits. False where the launch failed.
    bool resume(Thread& thread) {
        current_ = &thread;
        inside_ = true;
        const int came_back = _setjmp(scheduler_);
        if (came_back == 0) {
            if (thread.begun) _longjmp(thread.context, 1);
            begin(thread);
        }
        inside_ = false;
        return came_back == 1;
    }

    void begin(Thread& thread);

    // Back to the scheduler, until something makes this thread ready.
    void yield() {
        if (_setjmp(current_->context) == 0) _longjmp(scheduler_, 1);
    }

    // Says why, and gives up the fibers that stand in the middle of the kernel.
    bool report() {
        fprintf(stderr, "cuda emulation: %s\n", message_.c_str());
        for (Thread& thread : threads_) thread.begun = false;
        return false;
    }

    static bool same_operation(const Thread& a, const Thread& b) {
        return a.operation == b.operation && a.mask == b.mask && a.width == b.width;
    }

    std::string stuck() const {
        unsigned ended = 0, at_barrier = 0, in_warp = 0;
        const Thread *barrier = nullptr, *lane = nullptr;
        for (unsigned i = 0; i < in_use_; ++i) {
            const Thread& thread = threads_[i];
            ended += thread.wait == Wait::Done;
            if (thread.wait == Wait::Block) ++at_barrier, barrier = &thread;
            if (thread.wait == Wait::Warp) ++in_warp, lane = lane ? lane : &thread;
        }
        const Thread* other = nullptr;
        for (unsigned i = 0; lane && i < in_use_; ++i)
            if (threads_[i].wait == Wait::Warp && !same_operation(threads_[i], *lane)) other = &threads_[i];
        std::string text = "no thread can go on: " + std::to_string(ended) + " have ended";
        if (barrier)
            text += ", " + std::to_string(at_barrier) + " wait at a barrier (thread " +
                    std::to_string(barrier->linear) + " in line " + std::to_string(barrier->line) + ")";
        if (lane)
            text += ", " + std::to_string(in_warp) + " wait for lanes of their warp (thread " +
                    std::to_string(lane->linear) + " in " + name_of(lane->operation) + ")";
        if (other)
            text += ", among them thread " + std::to_string(other->linear) + " in " + name_of(other->operation) +
                    " or with another mask or width";
        return text + ", in block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + ", " +
               std::to_string(block_index.z) + ")";
    }

    uint64_t exchange(unsigned base, unsigned lane) {
        const Thread& self = threads_[base + lane];
        const int me = static_cast<int>(lane), width = self.width, segment = me / width * width;
        int source = me;
        switch (self.operation) {
            case Operation::Index: source = segment + (self.argument & (width - 1)); break;
            case Operation::Up: source = me - self.argument >= segment ? me - self.argument : me; break;
            case Operation::Down: source = me + self.argument < segment + width ? me + self.argument : me; break;
            case Operation::Xor: source = (me ^ self.argument) < segment + width ? me ^ self.argument : me; break;
            default: return combine(base, self);
        }
        if (!(self.mask >> source & 1))
            fail("lane " + std::to_string(me) + " asks for the value of lane " + std::to_string(source) +
                 ", which is not in the mask of its " + name_of(self.operation));
        return threads_[base + static_cast<unsigned>(source)].value;
    }

    uint64_t combine(unsigned base, const Thread& self) const {
        uint64_t ballot = 0, equal = 0, sum = 0, all = ~uint64_t{0}, any = 0;
        int64_t least = INT64_MAX, most = INT64_MIN;
        for (unsigned lane = 0; lane < WARP; ++lane) {
            if (!(self.mask >> lane & 1)) continue;
            const uint64_t value = threads_[base + lane].value;
            ballot |= uint64_t{value != 0} << lane;
            equal |= uint64_t{value == self.value} << lane;
            sum += value;
            all &= value;
            any |= value;
            least = std::min(least, static_cast<int64_t>(value));
            most = std::max(most, static_cast<int64_t>(value));
        }
        switch (self.operation) {
            case Operation::Ballot: return ballot;
            case Operation::Any: return ballot != 0;
            case Operation::All: return ballot == self.mask;
            case Operation::MatchAny: return equal;
            case Operation::Add: return sum;
            case Operation::Min: return static_cast<uint64_t>(least);
            case Operation::Max: return static_cast<uint64_t>(most);
            case Operation::And: return all;
            case Operation::Or: return any;
            default: return 0;
        }
    }
};

inline Machine& machine() {
    static thread_local Machine machine;
    return machine;
}

inline void enter_fiber() { machine().fiber(); }

inline void Machine::begin(Thread& thread) {
    if (!thread.stack) {
        void* memory = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for a thread's stack");
        // A kernel that needs more stack than this ends at the guard, not in its neighbour's.
        mprotect(memory, GUARD, PROT_NONE);
        thread.stack = static_cast<char*>(memory);
    }
    thread.begun = true;
    getcontext(&thread.entry);
    thread.entry.uc_stack.ss_sp = thread.stack + GUARD;
    // Stacks of one size would all need the same lines of the processor's cache.
    thread.entry.uc_stack.ss_size = STACK - thread.linear * 448 % 16384;
    thread.entry.uc_link = nullptr;
    makecontext(&thread.entry, enter_fiber, 0);
    setcontext(&thread.entry);
}

}  // namespace cluster::emulation
