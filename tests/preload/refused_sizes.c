/* Requests that are refused, with nothing but what they ask for in the way. Standard error may say why. */
#include "check.h"

static void *nothing(void *argument) { return argument; }
int main(void) {
    pthread_attr_t attributes;
    pthread_t thread = 1234;
    must(pthread_attr_init(&attributes));
    must(pthread_attr_setstacksize(&attributes, (size_t)1 << 46));
    for (int i = 0; i < 2; i++) {
        errno = E2BIG;
        int error = pthread_create(&thread, &attributes, nothing, NULL);
        say("64 TiB: %s", name(error));
    }
    must(pthread_attr_setstacksize(&attributes, 64 << 10));
    /* Granted by a C library that maps stack and guard inaccessible at first: before 2.42. */
    for (int power = 30; power <= 46; power += 8) {
        must(pthread_attr_setguardsize(&attributes, (size_t)1 << power));
        int error = pthread_create(&thread, &attributes, nothing, NULL);
        say("a guard of 2^%d bytes: %s", power, name(error));
        if (error == 0)
            must(pthread_join(thread, NULL));
    }
    must(pthread_attr_setguardsize(&attributes, 4096));
    must(pthread_create(&thread, &attributes, nothing, NULL));
    must(pthread_join(thread, NULL));
    struct sched_param parameter = {.sched_priority = 1};
    must(pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED));
    /* The attributes themselves are checked by the policy of the moment. */
    must(pthread_attr_setschedpolicy(&attributes, SCHED_FIFO));
    must(pthread_attr_setschedparam(&attributes, &parameter));
    must(pthread_attr_setschedpolicy(&attributes, SCHED_OTHER));
    say("priority 1 under OTHER: %s", name(pthread_create(&thread, &attributes, nothing, NULL)));
    return 0;
}
