/* Process 1 of a test guest, from two parts: init.c makes the machine, serve.c runs commands for the host. */
#ifndef EBB_GUEST_H
#define EBB_GUEST_H

#include <stddef.h>

/* Prints to the console why the guest cannot go on, and powers it off. */
__attribute__((noreturn, format(printf, 1, 2))) void die(const char* format, ...);

/* First line of a file, without its end. Returns whether the file could be read. */
int read_line(const char* path, char* text, size_t size);

/* Serves the host on the virtio port with this name, until the power goes. */
__attribute__((noreturn)) void serve(const char* port_name);

#endif
