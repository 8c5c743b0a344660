# The native code as object libraries, which the module and the harness link alike:
#   jax_tsq_cpu        kernels for CPUs
#   jax_tsq_cuda       kernels for every GPU, where JAX_TSQ_CUDA is set
#   jax_tsq_sm90       kernels for compute capability 9.0, likewise
#   jax_tsq_handlers   what XLA calls, where XLA_FFI_INCLUDE_DIR is set: what all handlers share, and the handlers of
#                      operations that have a CPU kernel
#   jax_tsq_gpu_handlers   ... and of those that have none
# and jax_tsq_flags, how all of it is compiled.

# Files of an operation are named by its stem: <stem>_handler.cc, <stem>_cpu.cc, <stem>_cuda.cu, <stem>_sm90.cu.
set(operations split ragged rows dual blocks swiglu dswiglu matmul wgrad)

set(ffi ${CMAKE_CURRENT_LIST_DIR}/../ffi)
set(cpu_tiles ${ffi}/cpu/tile.cc ${ffi}/cpu/tile_avx512.cc ${ffi}/cpu/rows.cc ${ffi}/cpu/square.cc
  ${ffi}/cpu/swiglu.cc)
set(handler_sources ${ffi}/xla/buffers.cc ${ffi}/xla/groups.cc ${ffi}/xla/handler.cc ${ffi}/xla/swiglu.cc)
set(cpu_sources ${ffi}/cpu/grid.cc ${ffi}/cpu/groups.cc ${ffi}/cpu/columns.cc ${cpu_tiles})
foreach(operation IN LISTS operations)
  set(stem ${ffi}/${operation}/${operation})
  foreach(part IN ITEMS cpu.cc cuda.cu sm90.cu)
    if(EXISTS ${stem}_${part})
      get_filename_component(kind ${part} NAME_WE)
      list(APPEND ${kind}_sources ${stem}_${part})
    endif()
  endforeach()
  if(EXISTS ${stem}_cpu.cc)
    list(APPEND handler_sources ${stem}_handler.cc)
  else()
    list(APPEND gpu_handler_sources ${stem}_handler.cc)
  endif()
endforeach()

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

add_library(jax_tsq_flags INTERFACE)
target_include_directories(jax_tsq_flags INTERFACE ${ffi})
# The bytes are specified, so no operation may be fused, reordered or approximated: fast-math is out of the question.
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set(host_options -Wall -Wextra -O3 -ffp-contract=off)
  list(JOIN host_options "," cuda_host_options)
  target_compile_options(jax_tsq_flags INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:${host_options}>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-O3;--fmad=false;-Xcompiler=${cuda_host_options}>")
  # Nobody reads floating-point exceptions, and GCC vectorizes less where it must keep them.
  set_source_files_properties(${cpu_tiles} PROPERTIES COMPILE_OPTIONS -fno-trapping-math)
endif()

function(add_objects name)
  add_library(${name} OBJECT EXCLUDE_FROM_ALL ${ARGN})
  target_link_libraries(${name} PRIVATE jax_tsq_flags)
endfunction()

add_objects(jax_tsq_cpu ${cpu_sources})

if(XLA_FFI_INCLUDE_DIR)
  foreach(kind IN ITEMS handler gpu_handler)
    add_objects(jax_tsq_${kind}s ${${kind}_sources})
    target_include_directories(jax_tsq_${kind}s SYSTEM PRIVATE ${XLA_FFI_INCLUDE_DIR})
  endforeach()
endif()

if(JAX_TSQ_CUDA)
  find_package(CUDAToolkit REQUIRED)
  target_compile_definitions(jax_tsq_flags INTERFACE JAX_TSQ_CUDA)
  add_objects(jax_tsq_cuda ${cuda_sources})

  # wgmma and setmaxnreg exist on sm_90a only, which no other GPU runs and no PTX serves. So these kernels are compiled
  # by themselves; the module loads everywhere, and asks for them on 9.0 only.
  add_objects(jax_tsq_sm90 ${sm90_sources})
  # An assertion in a loop of products would put waits between them, and ptxas only remarks that it does.
  target_compile_definitions(jax_tsq_sm90 PRIVATE NDEBUG)
  set(launcher sh ${CMAKE_CURRENT_LIST_DIR}/refuse_serialized_wgmma.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})
  set_target_properties(jax_tsq_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real CUDA_COMPILER_LAUNCHER "${launcher}")
endif()
