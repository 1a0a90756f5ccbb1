/* pthread_exit and what runs at the end of a thread: cleanup handlers, then the values of keys. */
#include "check.h"

static pthread_key_t first, second, stubborn, none;
static int rounds;

static void destroy(void *value) { say("  destructor: %s", (char *)value); }
static void set_again(void *value) {
    say("  stubborn destructor, round %d", ++rounds);
    must(pthread_setspecific(stubborn, value));
}
static void clean(void *what) { say("  cleanup: %s", (char *)what); }

static void set_keys(void) {
    must(pthread_setspecific(first, "first"));
    must(pthread_setspecific(second, "second"));
    must(pthread_setspecific(none, "without a destructor"));
}

static void deepest(void) {
    pthread_cleanup_push(clean, "deepest");
    pthread_exit("from the depth");
    pthread_cleanup_pop(1);
}
static void deep(void) {
    pthread_cleanup_push(clean, "deep");
    deepest();
    pthread_cleanup_pop(1);
}

static void *exits(void *unused) {
    (void)unused;
    set_keys();
    pthread_cleanup_push(clean, "outer");
    pthread_cleanup_push(clean, "inner");
    deep();
    pthread_cleanup_pop(0);
    pthread_cleanup_pop(0);
    return "not reached";
}
static void *returns(void *unused) {
    (void)unused;
    set_keys();
    pthread_cleanup_push(clean, "popped and run");
    pthread_cleanup_pop(1);
    pthread_cleanup_push(clean, "popped and not run");
    pthread_cleanup_pop(0);
    return "returned";
}
static void *is_stubborn(void *unused) {
    (void)unused;
    must(pthread_setspecific(stubborn, "again"));
    return "stubborn";
}
static void exit_in_destructor(void *value) {
    say("  destructor that exits: %s", (char *)value);
    pthread_exit("from a destructor");
}
static void *exits_in_destructor(void *key) {
    must(pthread_setspecific(*(pthread_key_t *)key, "value"));
    return "returned before";
}
/* The second level of keys, and that a fresh thread finds nothing of the last one's. */
static pthread_key_t many[200];
static int destroyed;
static void count(void *value) {
    (void)value;
    __atomic_add_fetch(&destroyed, 1, __ATOMIC_SEQ_CST);
}
static void *sets_many(void *unused) {
    for (int i = 0; i < 200; i++) {
        must(pthread_getspecific(many[i]) != NULL);
        must(pthread_setspecific(many[i], "x"));
    }
    must(pthread_getspecific(first) != NULL || pthread_getspecific(none) != NULL);
    return unused;
}

static void run(const char *what, void *(*routine)(void *), void *argument) {
    pthread_t thread;
    void *value;
    say("%s", what);
    must(pthread_create(&thread, NULL, routine, argument));
    must(pthread_join(thread, &value));
    say("  value: %s", (char *)value);
}

int main(void) {
    must(pthread_key_create(&first, destroy));
    must(pthread_key_create(&second, destroy));
    must(pthread_key_create(&none, NULL));
    must(pthread_key_create(&stubborn, set_again));
    run("exit", exits, NULL);
    run("return", returns, NULL);
    run("stubborn", is_stubborn, NULL);
    pthread_key_t exiting;
    must(pthread_key_create(&exiting, exit_in_destructor));
    run("exit in a destructor", exits_in_destructor, &exiting);
    for (int i = 0; i < 200; i++)
        must(pthread_key_create(&many[i], count));
    for (int i = 0; i < 10; i++) {
        pthread_t thread;
        must(pthread_create(&thread, NULL, sets_many, NULL));
        must(pthread_join(thread, NULL));
    }
    say("%d destroyed", destroyed);
    /* A key that is deleted while a thread has a value for it. */
    for (int i = 0; i < 200; i++)
        must(pthread_key_delete(many[i]));
    must(pthread_key_create(&many[0], count));
    run("a new key", returns, NULL);
    return 4;
}
