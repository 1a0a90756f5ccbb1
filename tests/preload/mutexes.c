/* What of a mutex hangs off a thread: robust lists, priority inheritance, and the ceilings that a thread has raised. */
#include "check.h"

static pthread_mutex_t robust, ceiling, inherit;
static int owner_dies;
static void *locks(void *mutex) {
    must(pthread_mutex_lock(mutex));
    return NULL;
}
static void *locks_ceiling(void *unused) {
    struct sched_param parameter;
    int policy;
    int error = pthread_mutex_lock(&ceiling);
    must(pthread_getschedparam(pthread_self(), &policy, &parameter));
    say("ceiling: %s", name(error));
    if (error == 0)
        must(pthread_mutex_unlock(&ceiling));
    return unused;
}
static void *counts(void *unused) {
    for (int i = 0; i < 20000; i++) {
        must(pthread_mutex_lock(&inherit));
        owner_dies++;
        must(pthread_mutex_unlock(&inherit));
    }
    return unused;
}
static void *dies_holding(void *unused) {
    must(pthread_mutex_lock(&robust));
    for (;;)
        pause();
    return unused;
}
static void run(void *(*routine)(void *), void *argument) {
    pthread_t thread;
    must(pthread_create(&thread, NULL, routine, argument));
    must(pthread_join(thread, NULL));
}

int main(void) {
    pthread_mutexattr_t attributes;
    must(pthread_mutexattr_init(&attributes));
    must(pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST));
    must(pthread_mutex_init(&robust, &attributes));
    for (int i = 0; i < 3; i++) {
        run(locks, &robust);
        say("its owner has ended: %s", name(pthread_mutex_lock(&robust)));
        must(pthread_mutex_consistent(&robust));
        must(pthread_mutex_unlock(&robust));
    }
    pthread_t thread;
    must(pthread_create(&thread, NULL, dies_holding, NULL));
    int error;
    while ((error = pthread_mutex_trylock(&robust)) == 0)
        must(pthread_mutex_unlock(&robust));
    must(error != EBUSY);
    must(pthread_cancel(thread));
    must(pthread_join(thread, NULL));
    say("its owner was cancelled: %s", name(pthread_mutex_lock(&robust)));
    must(pthread_mutex_unlock(&robust));
    say("and it was not made consistent: %s", name(pthread_mutex_lock(&robust)));

    must(pthread_mutexattr_init(&attributes));
    must(pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT));
    must(pthread_mutex_init(&inherit, &attributes));
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        must(pthread_create(&threads[i], NULL, counts, NULL));
    for (int i = 0; i < 4; i++)
        must(pthread_join(threads[i], NULL));
    say("inherit: %d", owner_dies);

    must(pthread_mutexattr_init(&attributes));
    must(pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_PROTECT));
    must(pthread_mutexattr_setprioceiling(&attributes, 5));
    must(pthread_mutex_init(&ceiling, &attributes));
    for (int i = 0; i < 3; i++)
        run(locks_ceiling, NULL);
    return 0;
}
