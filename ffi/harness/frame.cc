#include "harness/frame.h"

#include "harness/allocation.h"

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

struct XLA_FFI_ExecutionContext {
  jax_tsq::harness::Pool* pool;
};

namespace jax_tsq::harness {
namespace {

XLA_FFI_Error* CreateError(XLA_FFI_Error_Create_Args* args) {
  const AllocationsSucceed guard;
  return new XLA_FFI_Error{args->errc, args->message};
}

void GetMessage(XLA_FFI_Error_GetMessage_Args* args) { args->message = args->error->message.c_str(); }
void DestroyError(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }

XLA_FFI_Error* Schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  const AllocationsSucceed guard;
  if (args->ctx->pool->Schedule(args->task, args->data)) return nullptr;
  return new XLA_FFI_Error{XLA_FFI_Error_Code_UNAVAILABLE, "the pool takes no tasks"};
}

XLA_FFI_Error* NumThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = args->ctx->pool->threads();
  return nullptr;
}

XLA_FFI_Error* GetStream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = nullptr;
  return nullptr;
}

// What handlers have no business with stays null.
XLA_FFI_Api MakeApi() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = CreateError;
  api.XLA_FFI_Error_GetMessage = GetMessage;
  api.XLA_FFI_Error_Destroy = DestroyError;
  api.XLA_FFI_ThreadPool_Schedule = Schedule;
  api.XLA_FFI_ThreadPool_NumThreads = NumThreads;
  api.XLA_FFI_Stream_Get = GetStream;
  return api;
}

const XLA_FFI_Api kApi = MakeApi();

// Buffers as XLA passes them, and pointers to each.
struct Buffers {
  explicit Buffers(std::vector<FrameBuffer>& sources) {
    for (FrameBuffer& source : sources) {
      buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, source.type, source.data,
                         static_cast<int64_t>(source.dims.size()), source.dims.data()});
    }
    for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
  }
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> pointers;
};

}  // namespace

Pool::Pool(Behaviour behaviour, int64_t threads) : behaviour_(behaviour), threads_(threads) {
  if (behaviour != Behaviour::kThreads) return;
  for (int64_t i = 0; i < threads; ++i) {
    workers_.emplace_back([this] {
      while (RunOne()) continue;
    });
  }
}

Pool::~Pool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool Pool::Schedule(XLA_FFI_Task* task, void* data) {
  if (behaviour_ == Behaviour::kFails) return false;
  if (behaviour_ == Behaviour::kInline) {
    task(data);
    return true;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.emplace_back(task, data);
  }
  wake_.notify_one();
  return true;
}

// Waits for a task and runs it; false when there will be none.
bool Pool::RunOne() {
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
  if (tasks_.empty()) return false;
  const auto [task, data] = tasks_.front();
  tasks_.pop_front();
  lock.unlock();
  task(data);
  return true;
}

void Pool::RunLateTasks() {
  for (; behaviour_ == Behaviour::kLate && !tasks_.empty(); tasks_.pop_front()) {
    tasks_.front().first(tasks_.front().second);
  }
}

Outcome Invoke(XLA_FFI_Handler* handler, Frame& frame, Pool& pool, int64_t failing_allocation) {
  XLA_FFI_ExecutionContext context = {&pool};
  Buffers operands(frame.operands), results(frame.results);
  std::vector<XLA_FFI_ArgType> operand_kinds(frame.operands.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> result_kinds(frame.results.size(), XLA_FFI_RetType_BUFFER);

  const size_t count = frame.attributes.size();
  std::vector<XLA_FFI_AttrType> kinds;
  std::vector<XLA_FFI_ByteSpan> names(count), strings(count);
  std::vector<XLA_FFI_Scalar> scalars(count);
  std::vector<XLA_FFI_Array> arrays(count);
  std::vector<XLA_FFI_ByteSpan*> name_pointers;
  std::vector<void*> values;
  for (size_t i = 0; i < count; ++i) {
    FrameAttribute& attribute = frame.attributes[i];
    names[i] = strings[i] = {attribute.name.data(), attribute.name.size()};
    scalars[i] = {attribute.type, &attribute.value};
    arrays[i] = {attribute.type, 0, &attribute.value};
    kinds.push_back(attribute.kind);
    name_pointers.push_back(&names[i]);
    values.push_back(attribute.kind == XLA_FFI_AttrType_SCALAR   ? static_cast<void*>(&scalars[i])
                     : attribute.kind == XLA_FFI_AttrType_STRING ? static_cast<void*>(&strings[i])
                                                                 : static_cast<void*>(&arrays[i]));
  }

  XLA_FFI_CallFrame call = {};
  call.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE - frame.missing_bytes;
  call.api = &kApi;
  call.ctx = &context;
  call.stage = frame.stage;
  call.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(frame.operands.size()), operand_kinds.data(),
               operands.pointers.data()};
  call.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(frame.results.size()), result_kinds.data(),
               results.pointers.data()};
  call.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(count), kinds.data(),
                name_pointers.data(),      values.data()};
  FailAllocation(failing_allocation);
  XLA_FFI_Error* error = handler(&call);
  FailAllocation(0);
  pool.RunLateTasks();
  if (error == nullptr) return {};
  const Outcome outcome = {error->code, error->message};
  delete error;
  return outcome;
}

}  // namespace jax_tsq::harness
