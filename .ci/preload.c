/* A program of .ci/preload: what it does is the first argument, how often the second. Prints one line, and ends with 0 where
 * all was as it must be. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void must(int error, const char *what)
{
    if (error != 0) {
        fprintf(stderr, "%s: %s\n", what, strerror(error));
        exit(1);
    }
}

static void *same(void *argument)
{
    return argument;
}

static long resident_kib(void)
{
    long pages = 0, all;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file == NULL || fscanf(file, "%ld %ld", &all, &pages) != 2)
        exit(1);
    fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

/* create and join, eight at a time: memory must not grow with their number. */
static void many(long count)
{
    pthread_t threads[8];
    long warm = 0;
    for (long done = 0; done < count; done += 8) {
        if (done == count / 10 / 8 * 8)
            warm = resident_kib();
        for (long i = 0; i < 8; i++)
            must(pthread_create(&threads[i], NULL, same, (void *)i), "pthread_create");
        for (long i = 0; i < 8; i++) {
            void *result;
            must(pthread_join(threads[i], &result), "pthread_join");
            if (result != (void *)i)
                must(EINVAL, "the result");
        }
    }
    long grown = resident_kib() - warm;
    if (grown > 1024) {
        fprintf(stderr, "resident memory has grown by %ld KiB\n", grown);
        exit(1);
    }
    printf("many: %ld created and joined\n", count);
}

/* That many named threads, which wait to be looked at by a debugger until standard input ends. */
static pthread_mutex_t door = PTHREAD_MUTEX_INITIALIZER;

static void *waits(void *argument)
{
    pthread_mutex_lock(&door);
    pthread_mutex_unlock(&door);
    return argument;
}

static void show(long count)
{
    pthread_t *threads = calloc(count, sizeof *threads);
    char byte;
    pthread_mutex_lock(&door);
    for (long i = 0; i < count; i++) {
        must(pthread_create(&threads[i], NULL, waits, NULL), "pthread_create");
        must(pthread_setname_np(threads[i], "shown"), "pthread_setname_np");
    }
    printf("show: %ld\n", count);
    fflush(stdout);
    while (read(0, &byte, 1) > 0)
        ;
    pthread_mutex_unlock(&door);
    for (long i = 0; i < count; i++)
        must(pthread_join(threads[i], NULL), "pthread_join");
    free(threads);
}

int main(int argc, char **argv)
{
    long count = argc == 3 ? atol(argv[2]) : 0;
    if (count > 0 && strcmp(argv[1], "many") == 0)
        many(count);
    else if (count > 0 && strcmp(argv[1], "show") == 0)
        show(count);
    else
        return 2;
    return 0;
}
