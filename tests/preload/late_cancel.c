/* A request that reaches a thread in its last instructions: the signal of pthread_cancel, which the thread has blocked
   until then. Nothing is unwound any more. */
#include "check.h"
#include <sys/syscall.h>

enum { SIGCANCEL = 32 };

static void *returns(void *argument) {
    unsigned long only_that = 1UL << (SIGCANCEL - 1);
    must(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL));
    must(syscall(SYS_rt_sigprocmask, SIG_BLOCK, &only_that, NULL, sizeof only_that));
    must(syscall(SYS_tgkill, getpid(), gettid(), SIGCANCEL));
    return argument;
}
static void *sleeps(void *unused) {
    for (;;)
        pause();
    return unused;
}

int main(void) {
    pthread_t thread;
    void *value;
    /* The first one installs the handler. */
    must(pthread_create(&thread, NULL, sleeps, NULL));
    must(pthread_cancel(thread));
    must(pthread_join(thread, &value));
    say("cancelled: %d", value == PTHREAD_CANCELED);
    must(pthread_create(&thread, NULL, returns, "its own"));
    must(pthread_join(thread, &value));
    say("result: %s", value == PTHREAD_CANCELED ? "none" : (char *)value);
    return 0;
}
