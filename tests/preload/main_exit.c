/* pthread_exit in the main thread: the process ends with its last thread, as by exit(0). Argument: which way. */
#include "check.h"

static pthread_t main_thread;
static pid_t main_tid;

static void at_exit(void) { say("atexit"); }
static void clean(void *what) { say("cleanup: %s", (char *)what); }
static void destroy(void *what) { say("destructor: %s", (char *)what); }

static void await_main(void) {
    char path[64], line[256];
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", main_tid);
    for (;;) {
        FILE *file = fopen(path, "r");
        char *end = file && fgets(line, sizeof line, file) ? strrchr(line, ')') : NULL;
        char state = end ? end[2] : 'Z';
        if (file)
            fclose(file);
        if (state == 'Z')
            return;
        usleep(200);
    }
}

static void *last(void *unused) {
    await_main();
    say("main has ended");
    return unused;
}
static void *joins_main(void *unused) {
    void *value;
    must(pthread_join(main_thread, &value));
    say("joined main: %s", (char *)value);
    return unused;
}
static void *calls_exit(void *unused) {
    await_main();
    say("exit(7)");
    exit(7);
    return unused;
}
static void *starts_another(void *unused) {
    pthread_t thread;
    await_main();
    must(pthread_create(&thread, NULL, last, NULL));
    must(pthread_detach(thread));
    return unused;
}
static void *cancels_main(void *unused) {
    must(pthread_cancel(main_thread));
    void *value;
    must(pthread_join(main_thread, &value));
    say("main was cancelled: %d", value == PTHREAD_CANCELED);
    return unused;
}

int main(int count, char **arguments) {
    pthread_t thread;
    pthread_key_t key;
    const char *way = count > 1 ? arguments[1] : "alone";
    atexit(at_exit);
    main_thread = pthread_self();
    main_tid = gettid();
    must(pthread_key_create(&key, destroy));
    must(pthread_setspecific(key, "of main"));
    pthread_cleanup_push(clean, "of main");
    if (strcmp(way, "last") == 0)
        must(pthread_create(&thread, NULL, last, NULL));
    if (strcmp(way, "join") == 0)
        must(pthread_create(&thread, NULL, joins_main, NULL));
    if (strcmp(way, "exit") == 0)
        must(pthread_create(&thread, NULL, calls_exit, NULL));
    if (strcmp(way, "another") == 0)
        must(pthread_create(&thread, NULL, starts_another, NULL));
    if (strcmp(way, "cancel") == 0) {
        must(pthread_create(&thread, NULL, cancels_main, NULL));
        for (;;)
            pause();
    }
    if (strcmp(way, "after") == 0) {
        must(pthread_create(&thread, NULL, last, NULL));
        must(pthread_detach(thread));
    }
    pthread_exit("main's value");
    pthread_cleanup_pop(0);
}
