/* What the programs share. Each prints what a C library that is right makes it print: always the same text. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* A line by one write: those of several threads never mix, and a process that is killed has said it. */
__attribute__((format(printf, 1, 2), unused)) static void say(const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    line[length++] = '\n';
    if (write(1, line, length) != length)
        _exit(98);
}

/* An errno's name; 0 is "0". */
__attribute__((unused)) static const char *name(int error) {
    const char *text = strerrorname_np(error);
    return text ? text : "no errno";
}

/* What must not fail for the rest to mean anything. */
#define must(call)                                                                                 \
    do {                                                                                           \
        int answer_ = (call);                                                                      \
        if (answer_ != 0) {                                                                        \
            say("%s:%d: %s: %d, errno %s", __FILE__, __LINE__, #call, answer_, name(errno));       \
            _exit(97);                                                                             \
        }                                                                                          \
    } while (0)

/* Closed until opened: many wait, for as long as it takes. */
struct gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int open;
};
#define GATE {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0}

__attribute__((unused)) static void gate_wait(struct gate *gate) {
    pthread_mutex_lock(&gate->lock);
    while (!gate->open)
        pthread_cond_wait(&gate->changed, &gate->lock);
    pthread_mutex_unlock(&gate->lock);
}

__attribute__((unused)) static void gate_open(struct gate *gate) {
    pthread_mutex_lock(&gate->lock);
    gate->open = 1;
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
}

/* Until the kernel shows the thread asleep in its only blocking call. */
__attribute__((unused)) static void await_sleep(pid_t tid) {
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", tid);
    for (;;) {
        FILE *file = fopen(path, "r");
        char *end = file && fgets(line, sizeof line, file) ? strrchr(line, ')') : NULL;
        char state = end ? end[2] : 0;
        if (file)
            fclose(file);
        if (state == 'S' || state == 0)
            return;
        usleep(200);
    }
}

/* Until the kernel has no such thread any more. */
__attribute__((unused)) static void await_end(pid_t tid) {
    while (syscall(SYS_tgkill, getpid(), tid, 0) == 0)
        usleep(200);
}

/* Seconds from now, by that clock. */
__attribute__((unused)) static struct timespec after(clockid_t clock, double seconds) {
    struct timespec time;
    clock_gettime(clock, &time);
    long long all = time.tv_nsec + (long long)(seconds * 1e9);
    time.tv_sec += all / 1000000000;
    time.tv_nsec = all % 1000000000;
    if (time.tv_nsec < 0) {
        time.tv_nsec += 1000000000;
        time.tv_sec--;
    }
    return time;
}
