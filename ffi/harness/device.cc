#include "harness/device.h"

#include <cuda_runtime.h>

#include "harness/cuda_errors.h"

namespace jax_tsq::harness {
namespace {

// Device memory of the same layout, and a stream for it.
class DeviceMemory {
 public:
  explicit DeviceMemory(const Memory& memory) {
    CheckCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    for (const Array& array : memory) {
      void* allocation;
      CheckCuda(cudaMalloc(&allocation, array.bytes.size()));
      allocations_.push_back(static_cast<uint8_t*>(allocation));
    }
  }
  ~DeviceMemory() {
    for (uint8_t* allocation : allocations_) CheckCuda(cudaFree(allocation));
    CheckCuda(cudaStreamDestroy(stream_));
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  cudaStream_t stream() const { return stream_; }

  Addresses addresses(const Memory& memory) const {
    Addresses addresses;
    for (size_t i = 0; i < memory.size(); ++i) addresses.push_back(allocations_[i] + memory[i].start);
    return addresses;
  }

  void Upload(const Memory& memory, bool only_readable) {
    for (size_t i = 0; i < memory.size(); ++i) {
      const Array& array = memory[i];
      if (array.is_output || !only_readable) {
        Copy(allocations_[i], array.bytes.data(), array.bytes.size());
        continue;
      }
      for (const Range& range : array.readable) {
        const size_t offset = array.start + range.offset;
        Copy(allocations_[i] + offset, array.bytes.data() + offset, range.bytes);
      }
    }
  }

  void DownloadOutputs(Memory& memory) {
    for (size_t i = 0; i < memory.size(); ++i) {
      if (memory[i].is_output) Copy(memory[i].bytes.data(), allocations_[i], memory[i].bytes.size());
    }
    CheckCuda(cudaStreamSynchronize(stream_));
  }

 private:
  void Copy(void* to, const void* from, size_t bytes) {
    if (bytes > 0) CheckCuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
  }

  std::vector<uint8_t*> allocations_;
  cudaStream_t stream_;
};

}  // namespace

bool IsSm90() {
  cudaDeviceProp device;
  CheckCuda(cudaGetDeviceProperties(&device, 0));
  return device.major == 9 && device.minor == 0;
}

const char* RunOnDevice(const Test& test, Memory& memory, bool only_readable) {
  DeviceMemory device(memory);
  device.Upload(memory, only_readable);
  const char* const error = test.RunOnCuda(device.addresses(memory), device.stream());
  device.DownloadOutputs(memory);
  return error;
}

std::string CheckGraph(const Tests& tests) {
  const Memory layout = tests[0]->MakeMemory();
  DeviceMemory device(layout);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CheckCuda(cudaStreamBeginCapture(device.stream(), cudaStreamCaptureModeThreadLocal));
  const char* const error = tests[0]->RunOnCuda(device.addresses(layout), device.stream());
  CheckCuda(cudaStreamEndCapture(device.stream(), &graph));
  if (error != nullptr) return error;
  CheckCuda(cudaGraphInstantiate(&executable, graph, 0));
  std::string difference;
  for (const auto& test : tests) {
    Memory memory = test->MakeMemory();
    device.Upload(memory, false);
    Memory expected = memory;
    test->Expect(AddressesOf(expected));
    CheckCuda(cudaGraphLaunch(executable, device.stream()));
    device.DownloadOutputs(memory);
    difference = test->Compare(expected, memory);
    if (!difference.empty()) break;
  }
  CheckCuda(cudaGraphExecDestroy(executable));
  CheckCuda(cudaGraphDestroy(graph));
  return difference;
}

}  // namespace jax_tsq::harness
