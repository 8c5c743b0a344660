// XLA's side of a call: call frames made by hand, and thread pools that behave as badly as XLA's may.

#ifndef JAX_TSQ_HARNESS_FRAME_H_
#define JAX_TSQ_HARNESS_FRAME_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jax_tsq::harness {

struct FrameBuffer {
  XLA_FFI_DataType type;
  std::vector<int64_t> dims;
  void* data;
};

struct FrameAttribute {
  std::string name;
  XLA_FFI_AttrType kind;  // kSCALAR: `value` has `type`; kSTRING: the name itself; kARRAY: empty
  XLA_FFI_DataType type;
  int64_t value;
};

struct Frame {
  std::vector<FrameBuffer> operands, results;
  std::vector<FrameAttribute> attributes;  // sorted by name, as XLA has them
  XLA_FFI_ExecutionStage stage = XLA_FFI_ExecutionStage_EXECUTE;
  size_t missing_bytes = 0;  // of the frame's struct, as an older XLA would leave them out
};

class Pool {
 public:
  enum class Behaviour {
    kThreads,  // tasks run on threads of the pool
    kInline,   // tasks run while they are scheduled
    kLate,     // tasks run when the call has returned
    kFails,    // no task is taken
  };

  Pool(Behaviour behaviour, int64_t threads);  // `threads` is what NumThreads says, too
  ~Pool();

  bool Schedule(XLA_FFI_Task* task, void* data);
  void RunLateTasks();
  int64_t threads() const { return threads_; }

 private:
  bool RunOne();

  const Behaviour behaviour_;
  const int64_t threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks_;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

struct Outcome {
  XLA_FFI_Error_Code code = XLA_FFI_Error_Code_OK;
  std::string message;
};

// With `failing_allocation`, that one of the handler's allocations fails.
Outcome Invoke(XLA_FFI_Handler* handler, Frame& frame, Pool& pool, int64_t failing_allocation);

}  // namespace jax_tsq::harness

#endif  // JAX_TSQ_HARNESS_FRAME_H_
