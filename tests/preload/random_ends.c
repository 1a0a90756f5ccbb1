/* Threads that end in every way, at any moment: each value of a key and each cleanup handler is run exactly once.
   Argument: how many. */
#include "check.h"

static long pushed, cleaned, set, destroyed;
static pthread_key_t key;

static void clean(void *unused) {
    (void)unused;
    __atomic_add_fetch(&cleaned, 1, __ATOMIC_SEQ_CST);
}
static void destroy(void *unused) {
    (void)unused;
    __atomic_add_fetch(&destroyed, 1, __ATOMIC_SEQ_CST);
}

static void *work(void *argument) {
    unsigned seed = (unsigned)(long)argument;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    free(malloc(100 + seed % 5000));
    pthread_setspecific(key, argument);
    __atomic_add_fetch(&set, 1, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&pushed, 1, __ATOMIC_SEQ_CST);
    pthread_cleanup_push(clean, NULL);
    pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
    switch (seed / 4 % 4) {
        case 0:
            break;
        case 1:
            pthread_exit(argument);
        case 2:
            for (;;)
                pause();
        case 3:
            pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
            for (;;)
                ;
    }
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    pthread_cleanup_pop(1);
    return argument;
}

int main(int count, char **arguments) {
    long all = count > 1 ? atol(arguments[1]) : 4000;
    must(pthread_key_create(&key, destroy));
    pthread_attr_t attributes;
    must(pthread_attr_init(&attributes));
    must(pthread_attr_setstacksize(&attributes, 128 << 10));
    srand(14);
    long detached = 0;
    for (long i = 1; i <= all;) {
        pthread_t threads[8];
        long seeds[8];
        int several = 0;
        for (; several < 8 && i <= all; several++, i++) {
            seeds[several] = rand() % 65536 + 1;
            must(pthread_create(&threads[several], &attributes, work, (void *)seeds[several]));
        }
        for (int k = 0; k < several; k++) {
            int endless = seeds[k] / 4 % 4 >= 2;
            if (endless || rand() % 3 == 0)
                pthread_cancel(threads[k]);
            if (rand() % 4 == 0) {
                must(pthread_detach(threads[k]));
                detached++;
            } else {
                void *value;
                must(pthread_join(threads[k], &value));
                must(value != PTHREAD_CANCELED && value != (void *)seeds[k]);
                must(endless && value != PTHREAD_CANCELED);
            }
        }
    }
    /* The detached ones are on their way. A thread that was cancelled before it began has set and pushed nothing. */
    for (int i = 0; i < 10000 && (destroyed != set || cleaned != pushed); i++)
        usleep(1000);
    usleep(50000);
    say("%s, %s, detached %ld", cleaned == pushed ? "each handler ran once" : "HANDLERS LOST OR TWICE",
        destroyed == set ? "each destructor ran once" : "DESTRUCTORS LOST OR TWICE", detached);
    return 0;
}
