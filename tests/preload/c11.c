/* C11's threads. */
#include "check.h"
#include <threads.h>

static tss_t key;
static void destroy(void *value) { say("tss destructor: %s", (char *)value); }
static int returns(void *argument) {
    tss_set(key, "of returns");
    return (int)(long)argument;
}
static int exits(void *argument) {
    tss_set(key, "of exits");
    thrd_exit((int)(long)argument);
}
static thrd_t seen;
static int tells(void *argument) {
    (void)argument;
    seen = thrd_current();
    return 0;
}
static once_flag once = ONCE_FLAG_INIT;
static void say_once(void) { say("once"); }
static int calls_once(void *argument) {
    (void)argument;
    call_once(&once, say_once);
    return 0;
}
static mtx_t lock;
static cnd_t changed;
static int ready;
static int waits(void *argument) {
    (void)argument;
    mtx_lock(&lock);
    while (!ready)
        cnd_wait(&changed, &lock);
    mtx_unlock(&lock);
    return 9;
}
static int detaches(void *argument) {
    must(thrd_detach(thrd_current()) != thrd_success);
    sem_post(argument);
    return 0;
}

static void *value_of(void *argument) { return argument; }

int main(void) {
    thrd_t thread, threads[8];
    int code = 0;
    must(tss_create(&key, destroy));
    must(thrd_create(&thread, returns, (void *)-7L) != thrd_success);
    must(thrd_join(thread, &code) != thrd_success);
    say("returned %d", code);
    must(thrd_create(&thread, exits, (void *)8L) != thrd_success);
    must(thrd_join(thread, &code) != thrd_success);
    say("exited with %d", code);
    must(thrd_create(&thread, tells, NULL) != thrd_success);
    must(thrd_join(thread, NULL) != thrd_success);
    say("its own name for itself: %d, ours: %d", thrd_equal(seen, thread) != 0, thrd_equal(seen, thrd_current()) != 0);
    for (int i = 0; i < 8; i++)
        must(thrd_create(&threads[i], calls_once, NULL) != thrd_success);
    for (int i = 0; i < 8; i++)
        must(thrd_join(threads[i], NULL) != thrd_success);
    must(mtx_init(&lock, mtx_plain) != thrd_success);
    must(cnd_init(&changed) != thrd_success);
    must(thrd_create(&thread, waits, NULL) != thrd_success);
    mtx_lock(&lock);
    ready = 1;
    cnd_signal(&changed);
    mtx_unlock(&lock);
    must(thrd_join(thread, &code) != thrd_success);
    say("waited, %d", code);
    sem_t done;
    must(sem_init(&done, 0, 0));
    must(thrd_create(&thread, calls_once, NULL) != thrd_success);
    say("detach: %d", thrd_detach(thread) == thrd_success);
    must(thrd_create(&thread, detaches, &done) != thrd_success);
    while (sem_wait(&done) != 0)
        ;
    /* One kind's thread is the other's. */
    pthread_t other;
    void *value;
    must(thrd_create(&thread, returns, (void *)5L) != thrd_success);
    must(pthread_join(thread, &value));
    say("joined by pthread_join: %ld", (long)value);
    must(pthread_create(&other, NULL, value_of, (void *)6L));
    must(thrd_join(other, &code) != thrd_success);
    say("joined by thrd_join: %d", code);
    say("itself: %d", thrd_join(thrd_current(), NULL) == thrd_error);
    usleep(50000);
    return 0;
}
