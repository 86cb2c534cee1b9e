"""How GPU kernels are proved on a machine without a GPU.  Nothing here is imported by the library.

Three witnesses, each of which sees what the others cannot:

`interpreter` runs the Python of a kernel, program by program, on numpy.  It catches wrong equations, masks and edges,
and is blind to the compiler, the packing of inline asm, and alignment.

`compile` runs nothing: it compiles ahead of time for a chip and reads the machine code.  It catches spills, narrow
loads, a missing instruction, or too many of them.

`ptx` runs the compiled PTX, all threads of all programs in lock step, on numpy.  It catches layouts that went wrong,
swapped operands, accesses out of bounds, and counts what moves; it is blind to time, tensor cores and TMA.
"""
