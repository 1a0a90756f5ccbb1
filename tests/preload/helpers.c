/* Threads that the C library starts for itself: of timers, asynchronous I/O, name look-ups, message queues. */
#include "check.h"
#include <aio.h>
#include <mqueue.h>
#include <netdb.h>

static sem_t ready;
static pthread_t seen;

static void *value(void *argument) { return argument; }
static void create_and_join(const char *where) {
    pthread_t thread;
    void *got;
    must(pthread_create(&thread, NULL, value, "value"));
    must(pthread_join(thread, &got));
    say("%s: a thread's thread: %s", where, (char *)got);
}
static void notify(union sigval argument) {
    pthread_attr_t found;
    int detached;
    seen = pthread_self();
    must(pthread_getattr_np(pthread_self(), &found));
    must(pthread_attr_getdetachstate(&found, &detached));
    create_and_join((char *)argument.sival_ptr);
    say("%s: detached %d, detach again: %s, join itself: %s", (char *)argument.sival_ptr,
        detached == PTHREAD_CREATE_DETACHED, name(pthread_detach(pthread_self())),
        name(pthread_join(pthread_self(), NULL)));
    must(pthread_setname_np(pthread_self(), "named"));
    sem_post(&ready);
    pthread_exit(NULL);
}
static void await(void) {
    while (sem_wait(&ready) != 0)
        ;
}

int main(void) {
    must(sem_init(&ready, 0, 0));
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_THREAD, .sigev_notify_function = notify};
    event.sigev_value.sival_ptr = "timer";
    must(timer_create(CLOCK_MONOTONIC, &event, &timer));
    struct itimerspec soon = {.it_value = {.tv_nsec = 1000000}};
    for (int i = 0; i < 3; i++) {
        must(timer_settime(timer, 0, &soon, NULL));
        await();
    }
    must(timer_delete(timer));

    /* Attributes of the program's choice. */
    pthread_attr_t attributes;
    must(pthread_attr_init(&attributes));
    must(pthread_attr_setstacksize(&attributes, 300 << 10));
    event.sigev_notify_attributes = &attributes;
    event.sigev_value.sival_ptr = "timer with attributes";
    must(timer_create(CLOCK_REALTIME, &event, &timer));
    must(timer_settime(timer, 0, &soon, NULL));
    await();
    must(timer_delete(timer));
    event.sigev_notify_attributes = NULL;

    char text[] = "written by another thread";
    FILE *file = tmpfile();
    event.sigev_value.sival_ptr = "aio";
    struct aiocb request = {.aio_fildes = fileno(file), .aio_buf = text, .aio_nbytes = sizeof text, .aio_sigevent = event};
    must(aio_write(&request));
    await();
    must(aio_error(&request));
    say("aio: %zd bytes", aio_return(&request));

    char queue_name[64];
    snprintf(queue_name, sizeof queue_name, "/nptl-%d", getpid());
    struct mq_attr shape = {.mq_maxmsg = 1, .mq_msgsize = 8};
    mqd_t queue = mq_open(queue_name, O_CREAT | O_RDWR, 0600, &shape);
    if (queue != (mqd_t)-1) {
        must(mq_unlink(queue_name));
        event.sigev_value.sival_ptr = "message queue";
        must(mq_notify(queue, &event));
        must(mq_send(queue, "message", 8, 0));
        await();
    }

    struct gaicb look_up = {.ar_name = "127.0.0.1"};
    struct gaicb *list[] = {&look_up};
    must(getaddrinfo_a(GAI_WAIT, list, 1, NULL));
    say("getaddrinfo_a: %d", gai_error(&look_up));
    usleep(20000);
    return 0;
}
