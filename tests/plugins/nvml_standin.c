/* Stands in for NVIDIA's libnvidia-ml.so.1: three GPUs and a part of a divided one, by the symbols that are used of it.
 *
 * GPU 0: in use, may be shared; this user may not ask for its power. GPU 1: process 1 holds it for itself.
 * GPU 2: in exclusive mode too, and held by this process. Part 3: has memory of its own, but no utilisation.
 * With BARE defined, only the start is there, as in a library too old for all else.
 * STANDIN_START, if set, is the code that the start returns; STANDIN_NAME the name of GPU 2.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

static const char *UUIDS[] = {
    "GPU-00000000-0000-0000-0000-000000000000", "GPU-11111111-1111-1111-1111-111111111111",
    "GPU-22222222-2222-2222-2222-222222222222", "MIG-33333333-3333-3333-3333-333333333333"};
static const unsigned long long USED[] = {900, 500, 10, 70};
static int handles[4];

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { unsigned int pid; unsigned long long used; unsigned int instance, compute; } Process;

static int index_of(void *handle) { return (int)((int *)handle - handles); }

int nvmlInitWithFlags(unsigned int flags) {
    const char *code = getenv("STANDIN_START");
    return code ? atoi(code) : SUCCESS;
}
int nvmlInit(void) { return nvmlInitWithFlags(0); }
const char *nvmlErrorString(int code) { return "an error of the stand-in"; }

#ifndef BARE
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 3; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) {
    if (index > 2) return NOT_FOUND;
    *handle = &handles[index];
    return SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    for (int index = 0; index < 4; index++)
        if (strcmp(uuid, UUIDS[index]) == 0) { *handle = &handles[index]; return SUCCESS; }
    return NOT_FOUND;
}
int nvmlDeviceGetUUID(void *handle, char *text, unsigned int size) {
    strncpy(text, UUIDS[index_of(handle)], size);
    return SUCCESS;
}
int nvmlDeviceGetName(void *handle, char *text, unsigned int size) {
    const char *other = getenv("STANDIN_NAME");
    strncpy(text, other && index_of(handle) == 2 ? other : "Stand-in GPU", size);
    return SUCCESS;
}
int nvmlDeviceGetMigMode(void *handle, unsigned int *current, unsigned int *pending) { return NOT_SUPPORTED; }

int nvmlDeviceGetUtilizationRates(void *handle, Utilization *rates) {
    if (index_of(handle) == 3) return NOT_SUPPORTED;
    rates->gpu = 42; rates->memory = 7;
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    memory->total = 1000;
    memory->used = USED[index_of(handle)];
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned int *celsius) { *celsius = 61; return SUCCESS; }

int nvmlDeviceGetPowerUsage(void *handle, unsigned int *milliwatts) {
    if (index_of(handle) == 0) return NO_PERMISSION;
    *milliwatts = 250500;
    return SUCCESS;
}
int nvmlDeviceGetComputeMode(void *handle, int *mode) { *mode = index_of(handle) ? 3 : 0; return SUCCESS; }

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned int *count, Process *found) {
    if (*count < 1) { *count = 1; return INSUFFICIENT_SIZE; }
    *count = 1;
    found[0].pid = index_of(handle) == 1 ? 1 : (unsigned int)getpid();
    found[0].used = USED[index_of(handle)];
    return SUCCESS;
}
#endif
