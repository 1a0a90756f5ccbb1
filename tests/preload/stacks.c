/* The stack is as large as was asked for, and its guard is where it must be. */
#include "check.h"
#include <alloca.h>

/* What the thread's own block and the frames below may take of it. */
#define TAKEN (24 << 10)

static void *use(void *argument) {
    size_t bytes = (size_t)argument - TAKEN;
    volatile char *room = alloca(bytes);
    for (size_t at = 0; at < bytes; at += 512)
        room[at] = 1;
    return argument;
}

static void *overflow(void *unused) {
    (void)unused;
    pthread_attr_t found;
    void *low;
    size_t size;
    must(pthread_getattr_np(pthread_self(), &found));
    must(pthread_attr_getstack(&found, &low, &size));
    ((volatile char *)low)[0] = 1;
    say("the lowest byte is the thread's");
    ((volatile char *)low)[-1] = 1;
    say("no guard");
    return NULL;
}

static void caught(int signal, siginfo_t *info, void *context) {
    (void)context;
    /* MAPERR since glibc 2.42, which no longer takes mprotect for it where the kernel has something cheaper. */
    int is_guard = info->si_code == SEGV_ACCERR || info->si_code == SEGV_MAPERR;
    say("signal %d, of a guard %d", signal, is_guard);
    _exit(5);
}

static void *with_handler(void *unused) {
    static char room[64 << 10];
    stack_t stack = {.ss_sp = room, .ss_size = sizeof room};
    must(sigaltstack(&stack, NULL));
    return overflow(unused);
}

static void in_child(const char *what, void *(*routine)(void *)) {
    pid_t child = fork();
    if (child == 0) {
        pthread_t thread;
        must(pthread_create(&thread, NULL, routine, NULL));
        must(pthread_join(thread, NULL));
        _exit(0);
    }
    int status;
    must(waitpid(child, &status, 0) != child);
    if (WIFSIGNALED(status))
        say("%s: killed by signal %d", what, WTERMSIG(status));
    else
        say("%s: exit %d", what, WEXITSTATUS(status));
}

int main(void) {
    pthread_attr_t attributes;
    pthread_t thread;
    must(pthread_attr_init(&attributes));
    size_t sizes[] = {64 << 10, 65 << 10, 1 << 20, (1 << 20) + 4096, 5 << 20, 64 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        void *value;
        must(pthread_attr_setstacksize(&attributes, sizes[i]));
        must(pthread_create(&thread, &attributes, use, (void *)sizes[i]));
        must(pthread_join(thread, &value));
        say("%zu bytes used", (size_t)value);
    }
    pthread_attr_destroy(&attributes);

    in_child("overflow", overflow);
    struct sigaction action = {.sa_sigaction = caught, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    must(sigaction(SIGSEGV, &action, NULL));
    in_child("overflow with a handler", with_handler);
    return 0;
}
