/* Joins that must be refused: of a thread that another one joins, one of two threads that join each other, a second one.
   glibc lets the first two wait for ever (2.36 to 2.43: it looks for another joiner where it has written none), and 2.43
   has no error for the last. */
#include "check.h"

static pthread_t threads[2];
static struct gate known = GATE;
static int answers[2];

static void *join_the_other(void *argument) {
    long own = (long)argument;
    gate_wait(&known);
    answers[own] = pthread_join(threads[1 - own], NULL);
    /* The one that was refused ends, and so the other's join does. */
    return NULL;
}

static struct gate over = GATE;
static void *wait_for_end(void *argument) {
    gate_wait(&over);
    return argument;
}
static pid_t joiner_tid;
static void *join_first(void *target) {
    __atomic_store_n(&joiner_tid, gettid(), __ATOMIC_SEQ_CST);
    void *got;
    int error = pthread_join(*(pthread_t *)target, &got);
    say("the first joiner: %s, %ld", name(error), (long)got);
    return NULL;
}

int main(void) {
    pthread_t target, first;
    void *got;
    must(pthread_create(&target, NULL, wait_for_end, (void *)46));
    must(pthread_create(&first, NULL, join_first, &target));
    while (__atomic_load_n(&joiner_tid, __ATOMIC_SEQ_CST) == 0)
        usleep(100);
    await_sleep(joiner_tid);
    struct timespec soon = after(CLOCK_REALTIME, 0.02);
    say("joined by another: join %s, timedjoin %s, tryjoin %s", name(pthread_join(target, &got)),
        name(pthread_timedjoin_np(target, &got, &soon)), name(pthread_tryjoin_np(target, &got)));
    gate_open(&over);
    must(pthread_join(first, NULL));
    say("joined before: join %s, detach %s", name(pthread_join(target, NULL)), name(pthread_detach(target)));

    for (long i = 0; i < 2; i++)
        must(pthread_create(&threads[i], NULL, join_the_other, (void *)i));
    gate_open(&known);
    /* The other thread joins the refused one; this thread joins the other. */
    for (int i = 0; i < 2; i++) {
        int error;
        do
            error = pthread_tryjoin_np(threads[i], NULL);
        while (error == EBUSY && usleep(1000) == 0);
    }
    say("%s", answers[0] == EDEADLK || answers[1] == EDEADLK ? "one was refused: EDEADLK" : "none was refused");
    return 0;
}
