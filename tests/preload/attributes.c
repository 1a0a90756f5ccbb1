/* Everything in pthread_attr_t, and what pthread_getattr_np and the kernel say of the thread. All threads live until the
   end: a stack that is reused may be larger than what was asked for. */
#include "check.h"

static struct gate over = GATE;

struct asked {
    const char *what;
    sem_t ready;
};

static void *describe(void *argument) {
    struct asked *asked = argument;
    pthread_attr_t found;
    must(pthread_getattr_np(pthread_self(), &found));
    void *low;
    size_t size, guard;
    int detached, inherit, policy;
    struct sched_param parameter, mine;
    cpu_set_t cpus;
    sigset_t blocked;
    must(pthread_attr_getstack(&found, &low, &size));
    must(pthread_attr_getguardsize(&found, &guard));
    must(pthread_attr_getdetachstate(&found, &detached));
    must(pthread_attr_getinheritsched(&found, &inherit));
    must(pthread_attr_getschedpolicy(&found, &policy));
    must(pthread_attr_getschedparam(&found, &parameter));
    must(sched_getaffinity(0, sizeof cpus, &cpus));
    must(sched_getparam(0, &mine));
    must(pthread_sigmask(SIG_BLOCK, NULL, &blocked));
    char *here = __builtin_frame_address(0);
    say("%s: size %zu, guard %zu, %s, %s, policy %d priority %d, kernel's policy %d priority %d, cpu 0 %d of %d, "
        "USR1 %d, USR2 %d, RTMIN %d, on it %d",
        asked->what, size, guard, detached == PTHREAD_CREATE_DETACHED ? "detached" : "joinable",
        inherit == PTHREAD_EXPLICIT_SCHED ? "explicit" : "inherited", policy, parameter.sched_priority,
        sched_getscheduler(0), mine.sched_priority, CPU_ISSET(0, &cpus), CPU_COUNT(&cpus),
        sigismember(&blocked, SIGUSR1), sigismember(&blocked, SIGUSR2), sigismember(&blocked, SIGRTMIN),
        here > (char *)low && here < (char *)low + size);
    pthread_attr_destroy(&found);
    sem_post(&asked->ready);
    gate_wait(&over);
    return (void *)asked->what;
}

static pthread_t threads[64];
static const char *names[64];
static int count;

static void start(const char *what, pthread_attr_t *attributes) {
    struct asked *asked = malloc(sizeof *asked);
    asked->what = what;
    must(sem_init(&asked->ready, 0, 0));
    pthread_t thread;
    int error = pthread_create(&thread, attributes, describe, asked);
    if (error) {
        say("%s: refused: %s", what, name(error));
        return;
    }
    while (sem_wait(&asked->ready) != 0)
        ;
    int detached = PTHREAD_CREATE_JOINABLE;
    if (attributes)
        must(pthread_attr_getdetachstate(attributes, &detached));
    if (detached == PTHREAD_CREATE_JOINABLE) {
        names[count] = what;
        threads[count++] = thread;
    } else {
        say("%s: join: %s, detach: %s", what, name(pthread_join(thread, NULL)), name(pthread_detach(thread)));
    }
}

int main(void) {
    pthread_attr_t attributes;
    start("none", NULL);
    must(pthread_attr_init(&attributes));
    start("initialised", &attributes);

    struct { const char *what; size_t size; } sizes[] = {
        {"the least", PTHREAD_STACK_MIN}, {"64 KiB", 64 << 10},        {"200,000", 200000},
        {"1 MiB", 1 << 20},               {"1 MiB + 4 KiB", 1028 << 10}, {"1 MiB + 1", (1 << 20) + 1},
        {"3 MiB + 64 KiB", 3136 << 10},   {"100 MiB", 100 << 20},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        must(pthread_attr_setstacksize(&attributes, sizes[i].size));
        start(sizes[i].what, &attributes);
    }
    say("one byte less than the least: %s", name(pthread_attr_setstacksize(&attributes, PTHREAD_STACK_MIN - 1)));

    must(pthread_attr_setstacksize(&attributes, 256 << 10));
    struct { const char *what; size_t size; } guards[] = {
        {"no guard", 0},        {"a guard of 1", 1},        {"a guard of 4096", 4096},
        {"a guard of 20,000", 20000}, {"a guard of 64 KiB", 64 << 10}, {"a guard of 1 MiB", 1 << 20},
        {"a guard of 64 GiB", (size_t)64 << 30},
    };
    for (size_t i = 0; i < sizeof guards / sizeof *guards; i++) {
        must(pthread_attr_setguardsize(&attributes, guards[i].size));
        start(guards[i].what, &attributes);
    }
    must(pthread_attr_setguardsize(&attributes, 4096));

    must(pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED));
    start("detached", &attributes);
    must(pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_JOINABLE));

    /* Root may have a real-time policy; anybody else reads EPERM, in each run. */
    struct sched_param parameter = {.sched_priority = 7};
    must(pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED));
    start("explicit, and nothing set", &attributes);
    must(pthread_attr_setschedpolicy(&attributes, SCHED_FIFO));
    must(pthread_attr_setschedparam(&attributes, &parameter));
    start("explicit FIFO 7", &attributes);
    must(pthread_attr_setschedpolicy(&attributes, SCHED_RR));
    start("explicit RR 7", &attributes);
    must(pthread_attr_setinheritsched(&attributes, PTHREAD_INHERIT_SCHED));
    start("RR 7, but inherited", &attributes);
    pthread_attr_destroy(&attributes);

    must(pthread_attr_init(&attributes));
    cpu_set_t all, one, none;
    must(sched_getaffinity(0, sizeof all, &all));
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    must(pthread_attr_setaffinity_np(&attributes, sizeof one, &one));
    start("on cpu 0", &attributes);
    CPU_ZERO(&none);
    CPU_SET(1000, &none);
    must(pthread_attr_setaffinity_np(&attributes, sizeof none, &none));
    start("on cpu 1000", &attributes);
    must(pthread_attr_setaffinity_np(&attributes, 0, &none));
    start("on any cpu again", &attributes);
    must(sched_setaffinity(0, sizeof one, &one));
    start("inherited: cpu 0", &attributes);
    must(sched_setaffinity(0, sizeof all, &all));

    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR1);
    must(pthread_sigmask(SIG_BLOCK, &signals, NULL));
    start("inherited mask", &attributes);
    sigemptyset(&signals);
    sigaddset(&signals, SIGUSR2);
    must(pthread_attr_setsigmask_np(&attributes, &signals));
    start("mask of its own", &attributes);
    sigfillset(&signals);
    must(pthread_attr_setsigmask_np(&attributes, &signals));
    start("all blocked", &attributes);
    must(pthread_attr_setsigmask_np(&attributes, NULL));
    start("inherited mask again", &attributes);
    sigemptyset(&signals);
    must(pthread_sigmask(SIG_SETMASK, &signals, NULL));
    pthread_attr_destroy(&attributes);

    must(pthread_attr_init(&attributes));
    size_t size = 256 << 10;
    char *stack = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(stack == MAP_FAILED);
    must(pthread_attr_setstack(&attributes, stack, size));
    start("a stack of the program's", &attributes);
    static char room[(64 << 10) + 8] __attribute__((aligned(64)));
    must(pthread_attr_setstack(&attributes, room + 8, 64 << 10));
    start("a static, odd one", &attributes);
    pthread_attr_destroy(&attributes);

    must(pthread_getattr_default_np(&attributes));
    must(pthread_attr_setstacksize(&attributes, 384 << 10));
    must(pthread_attr_setguardsize(&attributes, 12 << 10));
    must(pthread_setattr_default_np(&attributes));
    pthread_attr_destroy(&attributes);
    start("none, and another default", NULL);
    must(pthread_attr_init(&attributes));
    start("initialised, and another default", &attributes);
    pthread_attr_destroy(&attributes);

    must(pthread_getattr_np(pthread_self(), &attributes));
    void *low;
    must(pthread_attr_getstack(&attributes, &low, &size));
    say("the main thread's own: on it %d", (char *)&size > (char *)low && (char *)&size < (char *)low + size);
    pthread_attr_destroy(&attributes);

    gate_open(&over);
    for (int i = 0; i < count; i++) {
        void *value;
        must(pthread_join(threads[i], &value));
        must(value != names[i]);
    }
    say("%d joined; the program's stack is still there: %d", count, madvise(stack, 256 << 10, MADV_NORMAL));
    return 0;
}
