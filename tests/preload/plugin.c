/* The object that dlopen.c loads: static thread-local storage, and a thread that its constructor starts. */
#include "check.h"

__thread int initialised __attribute__((tls_model("initial-exec"))) = 77;
__thread char dynamic[4096] = "dynamic";
static int seen;

static void *value(void *argument) {
    (void)argument;
    return (void *)(long)(initialised + dynamic[0]);
}
__attribute__((constructor)) static void start_one(void) {
    pthread_t thread;
    void *got;
    must(pthread_create(&thread, NULL, value, NULL));
    must(pthread_join(thread, &got));
    seen = (int)(long)got;
}
int plugin_seen(void) { return seen; }
int plugin_value(void) { return initialised++ + dynamic[0]; }
__attribute__((destructor)) static void end(void) { say("plugin unloaded"); }
