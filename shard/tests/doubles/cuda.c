/* The driver, as far as collectives use it, for machines without a GPU: device memory is the host's, and
 * whatever is queued has been done. A test double: `tests/processes` compiles and loads it where the
 * kernels are emulated as well.
 *
 * Invariant: an event that was recorded is done, and carries the time of that.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    size_t src_x, src_y;
    int src_type;
    const void *src_host;
    uint64_t src_device;
    void *src_array;
    size_t src_pitch;
    size_t dst_x, dst_y;
    int dst_type;
    void *dst_host;
    uint64_t dst_device;
    void *dst_array;
    size_t dst_pitch, width, height;
} copy_2d;

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2 };

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }

int cuEventCreate(struct timespec **event, unsigned flags) {
    (void)flags;
    *event = calloc(1, sizeof **event);
    return *event ? SUCCESS : OUT_OF_MEMORY;
}

int cuEventRecord(struct timespec *event, void *stream) {
    (void)stream;
    return clock_gettime(CLOCK_MONOTONIC, event) ? INVALID_VALUE : SUCCESS;
}

int cuEventQuery(struct timespec *event) { return event ? SUCCESS : INVALID_VALUE; }

int cuEventElapsedTime(float *ms, struct timespec *start, struct timespec *end) {
    *ms = (end->tv_sec - start->tv_sec) * 1e3f + (end->tv_nsec - start->tv_nsec) * 1e-6f;
    return SUCCESS;
}

int cuEventElapsedTime_v2(float *ms, struct timespec *start, struct timespec *end) {
    return cuEventElapsedTime(ms, start, end);
}

int cuEventDestroy_v2(struct timespec *event) {
    free(event);
    return SUCCESS;
}

int cuStreamQuery(void *stream) { return stream ? INVALID_VALUE : SUCCESS; }

int cuMemAlloc_v2(uint64_t *start, size_t bytes) {
    *start = (uint64_t)malloc(bytes);
    return *start ? SUCCESS : OUT_OF_MEMORY;
}

int cuMemFree_v2(uint64_t start) {
    free((void *)start);
    return SUCCESS;
}

int cuMemsetD32Async(uint64_t at, unsigned word, size_t count, void *stream) {
    if (stream) return INVALID_VALUE;
    for (size_t i = 0; i < count; i++) ((unsigned *)at)[i] = word;
    return SUCCESS;
}

int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
    memcpy(to, (const void *)from, bytes);
    return SUCCESS;
}

int cuMemcpy2DAsync_v2(const copy_2d *copy, void *stream) {
    if (stream || copy->src_type != 2 || copy->dst_type != 2 || copy->width > copy->src_pitch) {
        return INVALID_VALUE;
    }
    for (size_t row = 0; row < copy->height; row++) {
        const char *from = (const char *)copy->src_device + row * copy->src_pitch;
        memcpy((char *)copy->dst_device + row * copy->dst_pitch, from, copy->width);
    }
    return SUCCESS;
}
