#include "xla/handler.h"

#include <exception>
#include <utility>

#include "xla/pool.h"

namespace jax_tsq {
namespace {

// Reads all operands or results.
template <typename Remaining, typename Get>
ffi::ErrorOr<Buffers> ReadAll(const Remaining& remaining, Get get) {
  Buffers buffers;
  buffers.reserve(remaining.size());
  for (size_t i = 0; i < remaining.size(); ++i) {
    auto buffer = get(remaining, i);
    if (!buffer.has_value()) return ffi::Unexpected(buffer.error());
    buffers.push_back(*buffer);
  }
  return buffers;
}

ffi::ErrorOr<Buffers> ReadOperands(const ffi::RemainingArgs& args) {
  return ReadAll(args, [](const auto& all, size_t i) { return all.template get<ffi::AnyBuffer>(i); });
}

ffi::ErrorOr<Buffers> ReadResults(const ffi::RemainingRets& rets) {
  return ReadAll(rets, [](const auto& all, size_t i) -> ffi::ErrorOr<ffi::AnyBuffer> {
    auto result = all.template get<ffi::AnyBuffer>(i);
    if (!result.has_value()) return ffi::Unexpected(result.error());
    return **result;
  });
}

// Reads the buffers and calls `body`; nothing may be thrown into XLA.
template <class Context>
ffi::Error Handle(const char* function, const std::function<ffi::Error(const Call&, Context)>& body,
                  const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, const ffi::Dictionary& attributes,
                  Context context) {
  const auto failure = [&](ffi::ErrorCode code, const std::string& message) {
    return ffi::Error(code, std::string("jax_tsq.") + function + ": " + message);
  };
  try {
    auto operands = ReadOperands(args);
    if (!operands.has_value()) return operands.error();
    auto results = ReadResults(rets);
    if (!results.has_value()) return results.error();
    const ffi::Error error = body({std::move(*operands), std::move(*results), attributes}, context);
    return error.success() ? error : failure(*error.errc(), error.message());
  } catch (const std::exception& exception) {  // memory that ran out, say
    return failure(ffi::ErrorCode::kInternal, exception.what());
  }
}

template <class Attribute>
ffi::Error Read(const ffi::Dictionary& attributes, const char* name, Attribute& value) {
  const ffi::ErrorOr<Attribute> read = attributes.get<Attribute>(name);
  if (!read.has_value()) return Invalid("attribute " + std::string(name) + ": " + read.error().message());
  value = *read;
  return ffi::Error::Success();
}

}  // namespace

ffi::Ffi* BindCpu(const char* function, std::function<ffi::Error(const Call&, const Executor&)> body) {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs()
      .To([function, body](ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           ffi::Dictionary attributes) {
        return Handle<const Executor&>(function, body, args, rets, attributes, PoolExecutor(pool));
      })
      .release();
}

ffi::Ffi* BindCuda(const char* function, std::function<ffi::Error(const Call&, Stream)> body) {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<Stream>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs()
      .To([function, body](
              Stream stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
              ffi::Dictionary attributes) { return Handle<Stream>(function, body, args, rets, attributes, stream); },
          {ffi::Traits::kCmdBufferCompatible})
      .release();
}

ffi::Error CheckAttributes(const ffi::Dictionary& attributes, size_t count) {
  if (attributes.size() == count) return ffi::Error::Success();
  return Invalid("expected " + std::to_string(count) + " attributes; got " + std::to_string(attributes.size()) + ".");
}

ffi::Error ReadAttribute(const ffi::Dictionary& attributes, const char* name, bool& value) {
  return Read(attributes, name, value);
}

ffi::Error ReadAttribute(const ffi::Dictionary& attributes, const char* name, int64_t& value) {
  return Read(attributes, name, value);
}

ffi::Error ReadAttribute(const ffi::Dictionary& attributes, const char* name, float& value) {
  return Read(attributes, name, value);
}

}  // namespace jax_tsq
