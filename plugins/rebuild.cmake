# Compiles a bundle's PTX with this machine's ptxas and sets MOEE_MODULES to a table of the results. For drivers that are
# older than the compiler that made the shipped cubins. `modules.txt` lists, by index, `FILE SM KIND`.
find_program(PTXAS ptxas HINTS $ENV{CUDA_HOME}/bin PATHS /usr/local/cuda/bin)
if(NOT PTXAS)
  message(FATAL_ERROR "ptxas not found: install the CUDA toolkit or set CUDA_HOME")
endif()
set(rebuilt ${CMAKE_CURRENT_BINARY_DIR}/rebuilt)
file(MAKE_DIRECTORY ${rebuilt})
file(STRINGS ${MOEE_TABLES}/modules.txt modules)
set(index 0)
set(data "")
set(entries "")
foreach(line IN LISTS modules)
  separate_arguments(line)
  list(GET line 0 name)
  list(GET line 1 sm)
  list(GET line 2 kind)
  set(ptx ${CMAKE_CURRENT_SOURCE_DIR}/ptx/${name}.ptx)
  if(kind STREQUAL "ptx")
    set(file ${ptx})
  else()
    set(file ${rebuilt}/${name}.cubin)
    execute_process(COMMAND ${PTXAS} -arch=${sm} ${ptx} -o ${file} RESULT_VARIABLE failed ERROR_VARIABLE reason)
    if(failed)
      message(FATAL_ERROR "ptxas cannot compile ${name}.ptx for ${sm}: ${reason}")
    endif()
  endif()
  string(APPEND data "MOEE_MODULE(${index}, \"${file}\")\n")
  string(APPEND entries "        moee_module_${index},\n")
  math(EXPR index "${index} + 1")
endforeach()
set(MOEE_MODULES ${rebuilt}/modules.cpp)
file(WRITE ${MOEE_MODULES} "// Written by rebuild.cmake.
#include \"operator/tables.h\"
#define MOEE_MODULE(i, path) \\
  __asm__(\".pushsection .rodata\\n.balign 16\\n.globl moee_module_\" #i \"\\n.hidden moee_module_\" #i \\
          \"\\nmoee_module_\" #i \":\\n.incbin \\\"\" path \"\\\"\\n.byte 0\\n.popsection\\n\"); \\
  extern \"C\" unsigned char const moee_module_##i[];
${data}
namespace moee {
unsigned char const* moduleImage(int32_t module) {
    static unsigned char const* const images[] = {
${entries}    };
    return images[module];
}
}
")
message(STATUS "compiled ${index} kernels with ${PTXAS}")
