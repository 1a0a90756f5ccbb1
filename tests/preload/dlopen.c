/* An object with thread-local storage is loaded while threads run; its constructor starts the process's first thread.
   Argument: the object. */
#include "check.h"
#include <dlfcn.h>

static struct gate loaded = GATE;
static sem_t ready;
static int (*function)(void);
static void *waits(void *unused) {
    sem_post(&ready);
    gate_wait(&loaded);
    say("in a thread that was there before: %d, %d", function(), function());
    return unused;
}
static void *nothing(void *argument) { return argument; }
static void *calls(void *unused) {
    say("in a later thread: %d, %d", function(), function());
    return unused;
}
int main(int count, char **arguments) {
    pthread_t threads[2];
    must(count != 2);
    must(sem_init(&ready, 0, 0));
    for (int round = 0; round < 2; round++) {
        loaded.open = 0;
        if (round == 1)
            for (int i = 0; i < 2; i++) {
                must(pthread_create(&threads[i], NULL, waits, NULL));
                while (sem_wait(&ready) != 0)
                    ;
            }
        void *object = dlopen(arguments[1], RTLD_NOW);
        if (!object) {
            say("%s", dlerror());
            return 1;
        }
        int (*seen)(void) = (int (*)(void))dlsym(object, "plugin_seen");
        function = (int (*)(void))dlsym(object, "plugin_value");
        say("its constructor's thread: %d; main: %d, %d", seen(), function(), function());
        gate_open(&loaded);
        if (round == 1)
            for (int i = 0; i < 2; i++)
                must(pthread_join(threads[i], NULL));
        pthread_t later;
        must(pthread_create(&later, NULL, calls, NULL));
        must(pthread_join(later, NULL));
        must(dlclose(object));
    }
    /* What a program finds that looks the functions up by itself. */
    int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) =
        (int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))dlsym(RTLD_DEFAULT, "pthread_create");
    int (*join)(pthread_t, void **) = (int (*)(pthread_t, void **))dlsym(RTLD_DEFAULT, "pthread_join");
    pthread_t thread;
    must(create(&thread, NULL, nothing, NULL));
    must(join(thread, NULL));
    say("by dlsym: done");
    return 0;
}
