# Finds nvcc and enables CUDA, unless this is a build for CPU only. Sets JAX_TSQ_CUDA.
#
# The compiler is the one that the user names (CUDACXX or CMAKE_CUDA_COMPILER), or the one that pip installed as a build
# requirement, or the one on the PATH, in this order.

string(TOLOWER "$ENV{JAX_TSQ_CPU_ONLY}" cpu_only)
if(cpu_only MATCHES "^(|0+|n|no|off|f|false)$")  # what pyproject.toml's overrides take for false
  set(cpu_only OFF)
else()
  set(cpu_only ON)
endif()
option(JAX_TSQ_CPU_ONLY "Leave the CUDA code out" ${cpu_only})

set(way_out "\nEither set CUDACXX to an nvcc of CUDA 12.1 or newer, or set JAX_TSQ_CPU_ONLY=1 to build for CPU only: jax_tsq "
  "then runs on GPUs as pure JAX, at a fraction of the speed.")
string(CONCAT way_out ${way_out})

function(find_nvcc)
  set(nvcc ${CMAKE_CUDA_COMPILER} $ENV{CUDACXX})
  if(nvcc)
    list(GET nvcc 0 nvcc)
    find_program(named_nvcc ${nvcc} NO_CACHE)
    if(NOT named_nvcc)
      message(FATAL_ERROR "The CUDA compiler named by CUDACXX or CMAKE_CUDA_COMPILER does not exist: ${nvcc}${way_out}")
    endif()
    set(nvcc ${named_nvcc})
  else()
    find_package(Python REQUIRED COMPONENTS Interpreter)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import importlib.util as u; s = u.find_spec('nvidia'); print(';'.join(s.submodule_search_locations) if s else '')"
      OUTPUT_VARIABLE nvidia OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    foreach(root IN LISTS nvidia)
      set(root ${root}/cu13)
      # JAX's GPU packages bring an nvcc without the rest that it needs to compile.
      if(EXISTS ${root}/bin/nvcc AND EXISTS ${root}/nvvm/bin/cicc AND EXISTS ${root}/include/crt
         AND EXISTS ${root}/include/cuda_runtime.h AND EXISTS ${root}/include/cccl
         AND EXISTS ${root}/lib/libcudart_static.a)
        set(nvcc ${root}/bin/nvcc)
        # The packages lay libraries out in a way that neither nvcc nor CMake expects.
        set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${root}/lib" PARENT_SCOPE)
        set(CUDA_CUDART ${root}/lib/libcudart.so.13 CACHE FILEPATH "Only CUDA::cudart_static is linked" FORCE)
        break()
      endif()
    endforeach()
    if(NOT nvcc)
      find_program(nvcc nvcc NO_CACHE)
    endif()
    if(NOT nvcc)
      message(FATAL_ERROR "No CUDA compiler: neither the PyPI packages that pyproject.toml lists nor an nvcc on the PATH "
        "are there.${way_out}")
    endif()
  endif()
  set(nvcc ${nvcc} PARENT_SCOPE)
endfunction()

# Every architecture whose kernels JAX users run, and intermediate code (PTX) for later ones: of 90, since newer compilers
# may drop what follows, and of the newest.
function(choose_cuda_architectures)
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE version ERROR_VARIABLE version RESULT_VARIABLE failed)
  if(failed OR NOT version MATCHES "release ([0-9]+\\.[0-9]+)")
    message(FATAL_ERROR "Not an nvcc: ${nvcc} answers to --version: ${version}${way_out}")
  endif()
  set(release ${CMAKE_MATCH_1})
  if(release VERSION_LESS 12.1)
    message(FATAL_ERROR "The CUDA compiler is too old: ${nvcc} is release ${release}, which cannot compile kernels that "
      "take more than 4 KB of parameters.${way_out}")
  endif()
  # CMake's own check fails too where nvcc does not like the C++ compiler, but hardly tells what to do.
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/probe.cu "#include <cuda_fp8.h>\n")
  execute_process(
    COMMAND ${nvcc} -ccbin ${CMAKE_CUDA_HOST_COMPILER} -std=c++17 -arch=sm_90 -c probe.cu -o probe.o
    WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR} OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "The CUDA compiler ${nvcc} (release ${release}) does not work with the C++ compiler "
      "${CMAKE_CUDA_HOST_COMPILER}:\n${output}${way_out}\nCXX chooses another C++ compiler.")
  endif()

  execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE supported COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9]+" supported "${supported}")
  set(architectures "")
  foreach(architecture IN ITEMS 80 89 90 100 120)
    if(architecture IN_LIST supported)
      list(APPEND architectures ${architecture}-real)
      set(newest ${architecture})
    endif()
  endforeach()
  if(NOT 90 IN_LIST supported)
    list(JOIN supported ", " supported)
    message(FATAL_ERROR "The CUDA compiler ${nvcc} (release ${release}) does not compile for compute capability 9.0, only "
      "for: ${supported}.${way_out}")
  endif()
  list(APPEND architectures 90-virtual ${newest}-virtual)
  list(REMOVE_DUPLICATES architectures)

  message(STATUS "CUDA ${release} from ${nvcc} for ${architectures}")
  set(architectures ${architectures} PARENT_SCOPE)
endfunction()

set(JAX_TSQ_CUDA OFF)
if(JAX_TSQ_CPU_ONLY OR NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  message(STATUS "Building for CPU only")
else()
  if(NOT CMAKE_CUDA_HOST_COMPILER)
    set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  endif()
  find_nvcc()
  choose_cuda_architectures()
  set(CMAKE_CUDA_COMPILER ${nvcc})
  if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES ${architectures})
  endif()
  enable_language(CUDA)
  set(JAX_TSQ_CUDA ON)
endif()
