/* NCCL for machines without a GPU: the calls that the shard makes, over shared memory and host pointers. A test
 * double: `tests/processes` compiles and loads it where the kernels are emulated as well.
 *
 * As mean as the real one. Every call but the abort returns at once and leaves the work to a thread; a dead
 * peer is not noticed; what waits for it ends with the abort alone. Only one call may be under way. An abort does not
 * return before everything recorded that names the communicator is gone.
 *
 * With NCCL_DOUBLE_NOTICES set a dead peer is noticed after all, as the real one does over sockets: looks at a call
 * that is under way then say so.
 *
 * What is called while the emulated device records is recorded with it, and done when that is replayed, by the thread
 * that does so. Not every rank needs to record at the same time.
 *
 * Invariant: sums are in rank order and in f32, so all ranks hold the same bits.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
enum { FLOAT16 = 6, FLOAT32 = 7, BFLOAT16 = 9 };
enum { SLOT_BYTES = 4 << 20, MAX_RANKS = 8 };

typedef struct { char internal[128]; } unique_id;

typedef struct { size_t size; unsigned magic, version; int blocking; } config;

typedef struct {
    _Atomic int joined;
    _Atomic unsigned arrived;
    _Atomic int processes[MAX_RANKS];
    char slots[MAX_RANKS][SLOT_BYTES];
} shared;

typedef struct {
    const char *from;
    char *to;
    size_t bytes;
    int type, gathers;
} work;

typedef struct {
    int rank, ranks;
    char name[128];
    shared *memory;
    _Atomic int state, abort;
    unsigned rounds;
    pthread_t thread;
    int threaded;
    /* The call that the thread works on. */
    work work;
    /* Calls that are recorded. */
    _Atomic int recorded;
} communicator;

/* A call that was recorded. */
typedef struct {
    communicator *comm;
    work work;
} record;

/* The emulated device's recorder, which is the program's. */
extern int cluster_emulation_is_recording(void);
extern int cluster_emulation_queue(int (*run)(void *), void (*release)(void *), void *data);

const char *ncclGetErrorString(int code) { return code == SUCCESS ? "no error" : "an error of the double"; }

const char *ncclGetLastError(void *comm) {
    (void)comm;
    return "";
}

int ncclGetVersion(int *version) {
    *version = 23007;
    return SUCCESS;
}

int ncclGetUniqueId(unique_id *id) {
    static _Atomic int count;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/cluster-nccl-double-%d-%d", (int)getpid(),
             atomic_fetch_add(&count, 1));
    return SUCCESS;
}

/* Waits for all ranks; 0 after an abort. */
static int barrier(communicator *comm) {
    unsigned goal = ++comm->rounds * comm->ranks;
    atomic_fetch_add(&comm->memory->arrived, 1);
    while (atomic_load(&comm->memory->arrived) < goal) {
        if (atomic_load(&comm->abort)) return 0;
        usleep(20);
    }
    return 1;
}

static float widen(const char *from, int type) {
    uint16_t half;
    uint32_t bits;
    float value;
    if (type == FLOAT32) {
        memcpy(&value, from, 4);
        return value;
    }
    memcpy(&half, from, 2);
    if (type == FLOAT16) {
        _Float16 narrow;
        memcpy(&narrow, &half, 2);
        return narrow;
    }
    bits = (uint32_t)half << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static void narrow(float value, char *to, int type) {
    if (type == FLOAT32) {
        memcpy(to, &value, 4);
    } else if (type == FLOAT16) {
        _Float16 half = value;
        memcpy(to, &half, 2);
    } else {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        uint16_t half = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        memcpy(to, &half, 2);
    }
}

static void add_up(communicator *comm, const work *work, size_t at, size_t bytes) {
    size_t width = work->type == FLOAT32 ? 4 : 2;
    for (size_t i = 0; i < bytes; i += width) {
        float sum = 0;
        for (int rank = 0; rank < comm->ranks; rank++) {
            sum += widen(comm->memory->slots[rank] + i, work->type);
        }
        narrow(sum, work->to + at + i, work->type);
    }
}

/* The call's work; 0 after an abort. */
static int exchange(communicator *comm, const work *work) {
    for (size_t at = 0; at < work->bytes; at += SLOT_BYTES) {
        size_t bytes = work->bytes - at < SLOT_BYTES ? work->bytes - at : SLOT_BYTES;
        memcpy(comm->memory->slots[comm->rank], work->from + at, bytes);
        if (!barrier(comm)) return 0;
        if (work->gathers) {
            for (int rank = 0; rank < comm->ranks; rank++) {
                memcpy(work->to + rank * work->bytes + at, comm->memory->slots[rank], bytes);
            }
        } else {
            add_up(comm, work, at, bytes);
        }
        if (!barrier(comm)) return 0;
    }
    return 1;
}

static void *collective(void *argument) {
    communicator *comm = argument;
    if (exchange(comm, &comm->work)) atomic_store(&comm->state, SUCCESS);
    return NULL;
}

static int replay(void *argument) {
    record *record = argument;
    return exchange(record->comm, &record->work) ? SUCCESS : SYSTEM_ERROR;
}

static void forget(void *argument) {
    record *record = argument;
    atomic_fetch_sub(&record->comm->recorded, 1);
    free(record);
}

static void *form(void *argument) {
    communicator *comm = argument;
    atomic_store(&comm->memory->processes[comm->rank], getpid());
    atomic_fetch_add(&comm->memory->joined, 1);
    while (atomic_load(&comm->memory->joined) < comm->ranks) {
        if (atomic_load(&comm->abort)) return NULL;
        usleep(100);
    }
    shm_unlink(comm->name);
    atomic_store(&comm->state, SUCCESS);
    return NULL;
}

static int start(communicator *comm, void *(*work)(void *)) {
    if (comm->threaded) pthread_join(comm->thread, NULL);
    atomic_store(&comm->state, IN_PROGRESS);
    comm->threaded = !pthread_create(&comm->thread, NULL, work, comm);
    return comm->threaded ? IN_PROGRESS : SYSTEM_ERROR;
}

int ncclCommInitRankConfig(communicator **out, int ranks, unique_id id, int rank, config *wanted) {
    if (wanted->magic != 0xcafebeef || wanted->blocking != 0 || ranks > MAX_RANKS) return INVALID_ARGUMENT;
    communicator *comm = calloc(1, sizeof *comm);
    int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
    if (!comm || file < 0 || ftruncate(file, sizeof(shared))) return SYSTEM_ERROR;
    comm->memory = mmap(NULL, sizeof(shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (comm->memory == MAP_FAILED) return SYSTEM_ERROR;
    memcpy(comm->name, id.internal, sizeof comm->name);
    comm->rank = rank;
    comm->ranks = ranks;
    *out = comm;
    return start(comm, form);
}

int ncclCommGetAsyncError(communicator *comm, int *state) {
    *state = atomic_load(&comm->state);
    if (*state != IN_PROGRESS || !getenv("NCCL_DOUBLE_NOTICES")) return SUCCESS;
    for (int rank = 0; rank < comm->ranks; rank++) {
        int process = atomic_load(&comm->memory->processes[rank]);
        if (process && kill(process, 0) && errno == ESRCH) *state = REMOTE_ERROR;
    }
    return SUCCESS;
}

int ncclCommAbort(communicator *comm) {
    atomic_store(&comm->abort, 1);
    if (comm->threaded) pthread_join(comm->thread, NULL);
    while (atomic_load(&comm->recorded)) usleep(100);
    shm_unlink(comm->name);
    munmap(comm->memory, sizeof(shared));
    free(comm);
    return SUCCESS;
}

static int queue(communicator *comm, const void *from, void *to, size_t count, int type, int gathers) {
    if (atomic_load(&comm->state) == IN_PROGRESS) return INVALID_USAGE;
    comm->work = (work){from, to, count * (type == FLOAT32 ? 4 : 2), type, gathers};
    if (!cluster_emulation_is_recording()) return start(comm, collective);
    record *kept = malloc(sizeof *kept);
    if (!kept) return SYSTEM_ERROR;
    *kept = (record){comm, comm->work};
    atomic_fetch_add(&comm->recorded, 1);
    return cluster_emulation_queue(replay, forget, kept);
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, communicator *comm, void *stream) {
    return op || stream ? INVALID_ARGUMENT : queue(comm, from, to, count, type, 0);
}

int ncclAllGather(const void *from, void *to, size_t count, int type, communicator *comm, void *stream) {
    return stream ? INVALID_ARGUMENT : queue(comm, from, to, count, type, 1);
}
