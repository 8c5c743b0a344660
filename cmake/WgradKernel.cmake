# The weight gradient's kernel as objects: target wgrad.
#
# wgmma and setmaxnreg exist on sm_90a only, which no other GPU runs and no PTX serves. Since the other kernels are built
# for every GPU, this one is compiled by itself; the module loads everywhere, and asks for the kernel on 9.0 only.

# Around the compiler and whatever the user has put around it.
set(wgrad_launcher sh ${CMAKE_CURRENT_LIST_DIR}/refuse_serialized_wgmma.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})

add_library(wgrad OBJECT ${CMAKE_CURRENT_LIST_DIR}/../ffi/wgrad/wgrad_sm90.cu)
target_include_directories(wgrad PRIVATE ${CMAKE_CURRENT_LIST_DIR}/../ffi)
set_target_properties(wgrad PROPERTIES
  CUDA_ARCHITECTURES 90a-real CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
  POSITION_INDEPENDENT_CODE ON CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
  # ptxas only remarks that it puts waits between products, so that nothing overlaps.
  CUDA_COMPILER_LAUNCHER "${wgrad_launcher}")
# NDEBUG: an assertion in the loop is such a wait, too. --fmad=false as for the other kernels: contractions are written.
target_compile_options(wgrad PRIVATE -O3 --fmad=false -DNDEBUG)
