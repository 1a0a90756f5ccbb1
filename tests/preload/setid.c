/* setuid and its like reach every thread. Only root can change: anybody else says so, in each run. */
#include "check.h"

static struct gate over = GATE, changed = GATE;
static sem_t ready;
static void *waits(void *unused) {
    uid_t real, effective, saved;
    sem_post(&ready);
    gate_wait(&changed);
    must(syscall(SYS_getresuid, &real, &effective, &saved));
    say("%u %u %u", real, effective, saved);
    sem_post(&ready);
    gate_wait(&over);
    return unused;
}
static void *changes(void *unused) {
    must(setresgid(4321, 4321, 4321));
    must(setresuid(1234, 1234, 1234));
    return unused;
}
static void *nothing(void *argument) { return argument; }
static void *comes_and_goes(void *stop) {
    pthread_t thread;
    while (!__atomic_load_n((int *)stop, __ATOMIC_SEQ_CST)) {
        must(pthread_create(&thread, NULL, nothing, NULL));
        must(pthread_join(thread, NULL));
    }
    return NULL;
}
int main(void) {
    pthread_t threads[4], other, churn;
    int stop = 0;
    if (geteuid() != 0) {
        say("not root");
        return 0;
    }
    must(sem_init(&ready, 0, 0));
    for (int i = 0; i < 4; i++)
        must(pthread_create(&threads[i], NULL, waits, NULL));
    for (int i = 0; i < 4; i++)
        while (sem_wait(&ready) != 0)
            ;
    must(pthread_create(&churn, NULL, comes_and_goes, &stop));
    for (int i = 0; i < 200; i++) {
        must(seteuid(i % 2 ? 0 : 1000));
    }
    must(pthread_create(&other, NULL, changes, NULL));
    must(pthread_join(other, NULL));
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    must(pthread_join(churn, NULL));
    say("main: %u %u", getuid(), getgid());
    gate_open(&changed);
    for (int i = 0; i < 4; i++)
        while (sem_wait(&ready) != 0)
            ;
    gate_open(&over);
    for (int i = 0; i < 4; i++)
        must(pthread_join(threads[i], NULL));
    return 0;
}
