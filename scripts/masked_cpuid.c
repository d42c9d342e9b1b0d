/* Preloaded library: hides instruction sets from a library whose `cpuid` instructions were replaced by `ud2`
 * (masked_engine.py). The signal handler executes `cpuid` and clears the bits given in hexadecimal by the variables
 * HIDE_7_EBX, HIDE_7_ECX, HIDE_7_EDX (leaf 7) and HIDE_71_EAX, HIDE_71_EDX (leaf 7, subleaf 1). */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdlib.h>
#include <ucontext.h>

static unsigned ebx, ecx, edx, eax1, edx1;

static unsigned mask(const char *name) {
    const char *value = getenv(name);
    return value ? strtoul(value, NULL, 16) : 0;
}

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)registers[REG_RIP];
    unsigned leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    (void)info;
    if (at[0] != 0x0f || at[1] != 0x0b) { /* an illegal instruction other than `ud2` */
        signal(number, SIG_DFL);
        return;
    }
    __cpuid_count(leaf, part, a, b, c, d);
    if (leaf == 7 && part == 0) b &= ~ebx, c &= ~ecx, d &= ~edx;
    if (leaf == 7 && part == 1) a &= ~eax1, d &= ~edx1;
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    ebx = mask("HIDE_7_EBX"), ecx = mask("HIDE_7_ECX"), edx = mask("HIDE_7_EDX");
    eax1 = mask("HIDE_71_EAX"), edx1 = mask("HIDE_71_EDX");
    sigaction(SIGILL, &action, NULL);
}
