/* Signals, names, clocks, scheduling and affinity of other threads, by the C library's own functions. */
#include "check.h"

static struct gate over = GATE;
static sem_t ready;
static volatile pid_t tid;
static volatile int got_signal, got_value;
static volatile pid_t got_by;

static void handle(int signal, siginfo_t *info, void *context) {
    (void)context;
    got_signal = signal;
    got_value = info->si_code == SI_QUEUE ? info->si_value.sival_int : -1;
    got_by = gettid();
    sem_post(&ready);
}
static void await(void) {
    while (sem_wait(&ready) != 0)
        ;
}
static void *waits(void *argument) {
    tid = gettid();
    sem_post(&ready);
    gate_wait(&over);
    return argument;
}
static void *takes_signal(void *argument) {
    sigset_t set;
    int signal;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    must(pthread_sigmask(SIG_BLOCK, &set, NULL));
    sem_post(&ready);
    must(sigwait(&set, &signal));
    say("sigwait: %d", signal == SIGUSR2);
    return argument;
}

int main(void) {
    pthread_t thread;
    must(sem_init(&ready, 0, 0));
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_RESTART};
    must(sigaction(SIGUSR1, &action, NULL));
    must(sigaction(SIGRTMIN + 1, &action, NULL));
    must(pthread_create(&thread, NULL, waits, NULL));
    await();

    must(pthread_kill(thread, 0));
    must(pthread_kill(thread, SIGUSR1));
    await();
    say("kill: the right signal %d, in the right thread %d", got_signal == SIGUSR1, got_by == tid);
    union sigval number = {.sival_int = 77};
    must(pthread_sigqueue(thread, SIGRTMIN + 1, number));
    await();
    say("sigqueue: the right signal %d, value %d, in the right thread %d", got_signal == SIGRTMIN + 1, got_value, got_by == tid);
    say("kill with a wrong number: %s", name(pthread_kill(thread, 999)));

    char text[16] = "", path[64], line[64] = "";
    must(pthread_setname_np(thread, "a name of 15 ch"));
    must(pthread_getname_np(thread, text, sizeof text));
    snprintf(path, sizeof path, "/proc/self/task/%d/comm", tid);
    FILE *file = fopen(path, "r");
    must(!fgets(line, sizeof line, file));
    fclose(file);
    line[strcspn(line, "\n")] = 0;
    say("name: %s, in the kernel: %s, too long: %s", text, line, name(pthread_setname_np(thread, "a name of 16 cha")));

    clockid_t clock;
    struct timespec spent;
    must(pthread_getcpuclockid(thread, &clock));
    must(clock_gettime(clock, &spent));
    say("clock: %d", spent.tv_sec == 0 && spent.tv_nsec > 0);

    int policy;
    struct sched_param parameter = {0};
    must(pthread_getschedparam(thread, &policy, &parameter));
    say("policy %d, priority %d", policy, parameter.sched_priority);
    say("batch: %s", name(pthread_setschedparam(thread, SCHED_BATCH, &parameter)));
    must(pthread_getschedparam(thread, &policy, &parameter));
    say("policy %d, the kernel's %d", policy, sched_getscheduler(tid));
    parameter.sched_priority = 3;
    int error = pthread_setschedparam(thread, SCHED_RR, &parameter);
    must(pthread_getschedparam(thread, &policy, &parameter));
    say("round robin: %s, policy %d, priority %d", name(error), policy, parameter.sched_priority);
    say("setschedprio: %s", name(pthread_setschedprio(thread, 4)));
    parameter.sched_priority = 0;
    must(pthread_setschedparam(thread, SCHED_OTHER, &parameter));

    cpu_set_t one, found;
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    must(pthread_setaffinity_np(thread, sizeof one, &one));
    must(pthread_getaffinity_np(thread, sizeof found, &found));
    say("affinity: %d cpu, %d", CPU_COUNT(&found), CPU_ISSET(0, &found));

    gate_open(&over);
    await_end(tid);
    say("ended, not joined: kill %s, probe %s", name(pthread_kill(thread, SIGUSR1)), name(pthread_kill(thread, 0)));
    must(pthread_join(thread, NULL));

    must(pthread_create(&thread, NULL, takes_signal, NULL));
    await();
    must(pthread_kill(thread, SIGUSR2));
    must(pthread_join(thread, NULL));
    /* A thread that was asked for its policy before it creates one. */
    must(pthread_getschedparam(pthread_self(), &policy, &parameter));
    over.open = 0;
    must(pthread_create(&thread, NULL, waits, NULL));
    await();
    must(pthread_getschedparam(thread, &policy, &parameter));
    say("policy %d", policy);
    gate_open(&over);
    must(pthread_join(thread, NULL));
    return 0;
}
