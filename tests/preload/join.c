/* Join, its variants and detach, with each of their errors. */
#include "check.h"

static struct gate over = GATE;
static void *value(void *argument) { return argument; }
static void *wait_for_end(void *argument) {
    gate_wait(&over);
    return argument;
}

static pthread_t start(void *(*routine)(void *), void *argument) {
    pthread_t thread;
    must(pthread_create(&thread, NULL, routine, argument));
    return thread;
}

/* Ended, but not joined. */
static pid_t tid_of_ended;
static void *tell_tid(void *argument) {
    tid_of_ended = gettid();
    return argument;
}
static pthread_t ended(void *argument) {
    pthread_t thread = start(tell_tid, argument);
    while (__atomic_load_n(&tid_of_ended, __ATOMIC_SEQ_CST) == 0)
        usleep(100);
    await_end(tid_of_ended);
    tid_of_ended = 0;
    return thread;
}

static void *itself(void *unused) {
    (void)unused;
    struct timespec soon = after(CLOCK_REALTIME, 0.01);
    void *got = (void *)1;
    say("itself: join %s, tryjoin %s, timedjoin %s", name(pthread_join(pthread_self(), &got)),
        name(pthread_tryjoin_np(pthread_self(), &got)), name(pthread_timedjoin_np(pthread_self(), &got, &soon)));
    return got;
}

static sem_t said;
static void *detaches_itself(void *unused) {
    (void)unused;
    int first = pthread_detach(pthread_self());
    say("itself: detach %s, again %s", name(first), name(pthread_detach(pthread_self())));
    sem_post(&said);
    return NULL;
}

static void *child_of_child(void *argument) {
    void *got;
    must(pthread_join(start(value, argument), &got));
    return got;
}

int main(void) {
    pthread_t target;
    void *got;
    must(pthread_join(start(value, (void *)42), &got));
    say("value %ld", (long)got);
    say("without a place for it: %s", name(pthread_join(start(value, (void *)43), NULL)));
    must(pthread_join(ended((void *)44), &got));
    say("of an ended one %ld", (long)got);
    must(pthread_join(start(child_of_child, (void *)45), &got));
    say("of a thread's thread %ld", (long)got);
    must(pthread_join(start(itself, NULL), &got));
    say("unchanged by a refused join: %ld", (long)got);
    say("main of itself: %s", name(pthread_join(pthread_self(), NULL)));

    target = start(wait_for_end, (void *)46);
    struct timespec soon = after(CLOCK_REALTIME, 0.02), past = after(CLOCK_REALTIME, -1);
    struct timespec soon_by_monotonic = after(CLOCK_MONOTONIC, 0.02);
    got = (void *)1;
    say("running: tryjoin %s", name(pthread_tryjoin_np(target, &got)));
    say("running: timedjoin %s, in the past %s", name(pthread_timedjoin_np(target, &got, &soon)),
        name(pthread_timedjoin_np(target, &got, &past)));
    say("running: clockjoin %s, by CPU time %s", name(pthread_clockjoin_np(target, &got, CLOCK_MONOTONIC, &soon_by_monotonic)),
        name(pthread_clockjoin_np(target, &got, CLOCK_PROCESS_CPUTIME_ID, &soon)));
    say("unchanged: %ld", (long)got);
    struct timespec start_of_wait = after(CLOCK_MONOTONIC, 0), limit = after(CLOCK_REALTIME, 0.05);
    must(pthread_timedjoin_np(target, &got, &limit) != ETIMEDOUT);
    struct timespec end_of_wait = after(CLOCK_MONOTONIC, 0);
    double waited = end_of_wait.tv_sec - start_of_wait.tv_sec + (end_of_wait.tv_nsec - start_of_wait.tv_nsec) / 1e9;
    say("it waited for the time: %d", waited > 0.049 && waited < 5);

    gate_open(&over);
    must(pthread_join(target, &got));
    say("of one that was waited for in vain: %ld", (long)got);

    soon = after(CLOCK_REALTIME, 20);
    soon_by_monotonic = after(CLOCK_MONOTONIC, 20);
    say("ended: tryjoin %s, timedjoin %s, clockjoin %s", name(pthread_tryjoin_np(ended((void *)47), &got)),
        name(pthread_timedjoin_np(ended(NULL), NULL, &soon)),
        name(pthread_clockjoin_np(start(value, NULL), NULL, CLOCK_MONOTONIC, &soon_by_monotonic)));
    say("and its value %ld; without a limit: %s", (long)got, name(pthread_timedjoin_np(start(value, NULL), NULL, NULL)));

    over.open = 0;
    pthread_t detached = start(wait_for_end, NULL);
    must(pthread_detach(detached));
    soon = after(CLOCK_REALTIME, 1);
    say("detached: join %s, tryjoin %s, timedjoin %s, detach %s", name(pthread_join(detached, NULL)),
        name(pthread_tryjoin_np(detached, NULL)), name(pthread_timedjoin_np(detached, NULL, &soon)),
        name(pthread_detach(detached)));
    gate_open(&over);
    say("an ended one: detach %s", name(pthread_detach(ended(NULL))));
    must(sem_init(&said, 0, 0));
    start(detaches_itself, NULL);
    while (sem_wait(&said) != 0)
        ;
    return 3;
}
