// Recording work and doing it again, as a device does with graphs: while a thread records, its launches are kept with
// their arguments instead of being run. What is not a launch can be added as a function.
//
// Invariant: what is recorded holds the values of all arguments, and nothing of the stack it was queued from.
#pragma once

#include <functional>
#include <memory>

#include "emulation_machine.h"

namespace cluster::emulation {

using Recorded = std::vector<std::function<cudaError_t()>>;

// What this thread's work is added to; none: work is done at once.
inline thread_local std::unique_ptr<Recorded> recording;

template <class Work>
cudaError_t queue(Work work) {
    if (!recording) return work();
    recording->push_back(std::move(work));
    return cudaSuccess;
}

}  // namespace cluster::emulation

// Defined wherever this is included, and the same everywhere.
#define CLUSTER_EMULATION_C extern "C" __attribute__((weak, used))

CLUSTER_EMULATION_C void cluster_emulation_begin() {
    cluster::emulation::recording = std::make_unique<cluster::emulation::Recorded>();
}

CLUSTER_EMULATION_C void* cluster_emulation_end() { return cluster::emulation::recording.release(); }

CLUSTER_EMULATION_C int cluster_emulation_is_recording() { return cluster::emulation::recording != nullptr; }

CLUSTER_EMULATION_C int cluster_emulation_replay(const void* recorded) {
    for (const auto& work : *static_cast<const cluster::emulation::Recorded*>(recorded))
        if (const cudaError_t error = work()) return error;
    return cudaSuccess;
}

CLUSTER_EMULATION_C void cluster_emulation_free(void* recorded) {
    delete static_cast<cluster::emulation::Recorded*>(recorded);
}

// Takes over `data`, which `free` ends. What `run` returns is an error where it is not 0, and ends a replay.
CLUSTER_EMULATION_C int cluster_emulation_queue(int (*run)(void*), void (*free)(void*), void* data) {
    const std::shared_ptr<void> kept(data, free);
    return cluster::emulation::queue([run, kept] { return static_cast<cudaError_t>(run(kept.get())); });
}
