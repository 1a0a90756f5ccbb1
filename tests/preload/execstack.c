/* Nested functions live on the stack of the thread that calls them: it must be executable. */
#include "check.h"

static int apply(int (*function)(int), int argument) { return function(argument); }
static void *work(void *argument) {
    int base = (int)(long)argument;
    int add(int number) { return base + number; }
    int sum = 0;
    for (int i = 0; i < 3; i++)
        sum += apply(add, i);
    return (void *)(long)sum;
}
int main(void) {
    say("main: %ld", (long)work((void *)1));
    for (long i = 1; i <= 3; i++) {
        pthread_t thread;
        void *got;
        must(pthread_create(&thread, NULL, work, (void *)(i * 10)));
        must(pthread_join(thread, &got));
        say("thread: %ld", (long)got);
    }
    return 0;
}
