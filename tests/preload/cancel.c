/* Cancellation: deferred and asynchronous, where it takes effect, what runs then, and of pthread_join. */
#include "check.h"

static pid_t tid;
static void clean(void *what) { say("  cleanup: %s", (char *)what); }
static void destroy(void *what) { say("  destructor: %s", (char *)what); }
static pthread_key_t key;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t never = PTHREAD_COND_INITIALIZER;
static sem_t semaphore;
static int ends[2];
static pthread_t target;
static struct gate over = GATE;

static void begin(void) {
    must(pthread_setspecific(key, "of the thread"));
    __atomic_store_n(&tid, gettid(), __ATOMIC_SEQ_CST);
}
static void *sleeps(void *unused) {
    begin();
    pthread_cleanup_push(clean, "outer");
    pthread_cleanup_push(clean, "inner");
    for (;;)
        pause();
    pthread_cleanup_pop(0);
    pthread_cleanup_pop(0);
    return unused;
}
static void *reads(void *unused) {
    begin();
    char byte;
    if (read(ends[0], &byte, 1) != 1)
        say("  read returned");
    return unused;
}
static void *waits_for_semaphore(void *unused) {
    begin();
    sem_wait(&semaphore);
    return unused;
}
static void unlock(void *mutex) {
    say("  the mutex is held: %s", name(pthread_mutex_trylock(mutex)));
    must(pthread_mutex_unlock(mutex));
}
static void *waits_for_condition(void *unused) {
    must(pthread_mutex_lock(&lock));
    begin();
    pthread_cleanup_push(unlock, &lock);
    for (;;)
        pthread_cond_wait(&never, &lock);
    pthread_cleanup_pop(0);
    return unused;
}
static void *computes(void *unused) {
    int old;
    must(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &old));
    must(old != PTHREAD_CANCEL_DEFERRED);
    pthread_cleanup_push(clean, "of a computation");
    begin();
    for (volatile unsigned long number = 0;; number++)
        ;
    pthread_cleanup_pop(0);
    return unused;
}
static struct gate cancelled = GATE;
static void *refuses(void *unused) {
    int old;
    must(pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &old));
    must(old != PTHREAD_CANCEL_ENABLE);
    begin();
    gate_wait(&cancelled);
    pthread_testcancel();
    say("  disabled: not yet");
    must(pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &old));
    must(old != PTHREAD_CANCEL_DISABLE);
    say("  enabled");
    pthread_testcancel();
    say("  not reached");
    return unused;
}
static void *cancels_itself(void *unused) {
    begin();
    must(pthread_cancel(pthread_self()));
    say("  still there");
    pthread_cleanup_push(clean, "of itself");
    pthread_testcancel();
    pthread_cleanup_pop(0);
    return unused;
}
static void *asynchronous_itself(void *unused) {
    begin();
    pthread_cleanup_push(clean, "of itself, at once");
    must(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL));
    must(pthread_cancel(pthread_self()));
    say("  not reached");
    pthread_cleanup_pop(0);
    return unused;
}
static void *waits_for_end(void *argument) {
    gate_wait(&over);
    return argument;
}
static void *joins(void *unused) {
    begin();
    pthread_cleanup_push(clean, "of a joiner");
    pthread_join(target, NULL);
    pthread_cleanup_pop(0);
    return unused;
}
static void *joins_asynchronously(void *unused) {
    must(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL));
    return joins(unused);
}
static void *joins_in_time(void *unused) {
    struct timespec later = after(CLOCK_REALTIME, 60);
    begin();
    pthread_timedjoin_np(target, NULL, &later);
    return unused;
}
static void *joins_uncancelled(void *unused) {
    must(pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL));
    begin();
    int error = pthread_join(target, NULL);
    say("  disabled: joined %s", name(error));
    return unused;
}
static void *exits(void *unused) {
    (void)unused;
    begin();
    pthread_cleanup_push(clean, "in which a cancellation is pending");
    must(pthread_cancel(pthread_self()));
    pthread_exit("exited");
    pthread_cleanup_pop(0);
}

static void *join_it(pthread_t thread) {
    void *value;
    must(pthread_join(thread, &value));
    say("  %s", value == PTHREAD_CANCELED ? "cancelled" : value ? (char *)value : "returned");
    return value;
}
static pthread_t start(const char *what, void *(*routine)(void *)) {
    pthread_t thread;
    say("%s", what);
    tid = 0;
    must(pthread_create(&thread, NULL, routine, NULL));
    while (__atomic_load_n(&tid, __ATOMIC_SEQ_CST) == 0)
        usleep(100);
    return thread;
}
static void cancel_asleep(const char *what, void *(*routine)(void *)) {
    pthread_t thread = start(what, routine);
    await_sleep(tid);
    must(pthread_cancel(thread));
    join_it(thread);
}

int main(void) {
    must(pthread_key_create(&key, destroy));
    must(sem_init(&semaphore, 0, 0));
    must(pipe(ends));
    cancel_asleep("pause", sleeps);
    cancel_asleep("read", reads);
    cancel_asleep("sem_wait", waits_for_semaphore);
    cancel_asleep("cond_wait", waits_for_condition);
    say("  the mutex is free: %s", name(pthread_mutex_trylock(&lock)));
    must(pthread_mutex_unlock(&lock));
    pthread_t thread = start("asynchronous", computes);
    must(pthread_cancel(thread));
    join_it(thread);
    thread = start("disabled", refuses);
    must(pthread_cancel(thread));
    gate_open(&cancelled);
    join_it(thread);
    join_it(start("itself", cancels_itself));
    join_it(start("itself, asynchronously", asynchronous_itself));
    join_it(start("exit with a pending one", exits));

    must(pthread_create(&target, NULL, waits_for_end, "the target's value"));
    cancel_asleep("join", joins);
    cancel_asleep("join, asynchronous", joins_asynchronously);
    cancel_asleep("timedjoin", joins_in_time);
    say("the target can still be joined: tryjoin %s", name(pthread_tryjoin_np(target, NULL)));
    gate_open(&over);
    join_it(target);

    over.open = 0;
    must(pthread_create(&target, NULL, waits_for_end, NULL));
    thread = start("join, disabled", joins_uncancelled);
    await_sleep(tid);
    must(pthread_cancel(thread));
    usleep(20000);
    gate_open(&over);
    join_it(thread);

    say("a pending one, met by join");
    must(pthread_create(&target, NULL, waits_for_end, NULL));
    thread = start("join", cancels_itself);
    join_it(thread);
    join_it(target);
    thread = start("an ended thread", exits);
    await_end(tid);
    say("  cancel: %s", name(pthread_cancel(thread)));
    join_it(thread);
    return 0;
}
