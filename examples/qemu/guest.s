# The guest of room.sh, in the boot sector of its disk: adds one to the number in sector 1, for ever, by the
# BIOS, so that each round is a read and a write of QEMU's block device. Says B on the serial port when it
# starts and F where the disk refuses. What is tested is QEMU's threads, and they do not mind how small a guest is.
.code16
.globl _start
_start:
    ljmp    $0, $segment
segment:
    xorw    %ax, %ax
    movw    %ax, %ds
    movw    %ax, %es
    movw    %ax, %ss
    movw    $0x7c00, %sp
    movb    %dl, drive
    movb    $'B', %al
    call    say
round:
    movb    $0x42, %ah
    call    disk
    incl    buffer
    movb    $0x43, %ah
    call    disk
    jmp     round

# Extended read (ah = 42) or write (ah = 43) of one sector.
disk:
    xorb    %al, %al
    movb    drive, %dl
    movw    $packet, %si
    int     $0x13
    jc      failed
    ret
failed:
    movb    $'F', %al
    call    say
stop:
    hlt
    jmp     stop

say:
    movw    $0x3f8, %dx
    outb    %al, %dx
    ret

drive:
    .byte   0
packet:
    .byte   16, 0
    .word   1
    .word   buffer, 0
    .quad   1

.org 510
    .word   0xaa55
.equ buffer, 0x8000
