/* What libnptl.so tells the program that it is loaded into, besides what it writes to NPTL_REPORT and NPTL_STATS.
 *
 * Each function has snprintf's convention: at most size bytes are written, the last of them a NUL, and the length of the
 * whole text is returned, without the NUL. With size 0 nothing is written, and buffer may be NULL. A program that is to
 * run without the library too finds them by dlsym(RTLD_DEFAULT, "nptl_last_failure") and so on. */
#ifndef NPTL_H
#define NPTL_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The last thread or process that this process was refused: one line, then the report. Empty if there was none.
 * Allocates nothing. */
int nptl_last_failure(char *buffer, size_t size);

/* Every limit that this process can meet when it makes a thread, a line each: in use, maximum, left, and where that was
 * read. The last line says which is reached first by threads with the process's default stack. Takes milliseconds and allocates; the first call starts a thread, to learn what one takes. */
int nptl_headroom(char *buffer, size_t size);

/* What NPTL_STATS writes when the process exits, in one line of key=value pairs. */
int nptl_stats(char *buffer, size_t size);

#ifdef __cplusplus
}
#endif

#endif
