#pragma once

#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>

#include <memory>
#include <sstream>
#include <string>

namespace quantmill::testing {

// Collects what is logged while it lives.
class CaptureLog {
public:
    CaptureLog() : saved_(spdlog::default_logger()) {
        const auto sink = std::make_shared<spdlog::sinks::ostream_sink_mt>(stream_, true);
        spdlog::set_default_logger(std::make_shared<spdlog::logger>("capture", sink));
    }
    ~CaptureLog() { spdlog::set_default_logger(saved_); }
    CaptureLog(const CaptureLog&) = delete;
    CaptureLog& operator=(const CaptureLog&) = delete;
    std::string text() const { return stream_.str(); }

private:
    std::ostringstream stream_;
    std::shared_ptr<spdlog::logger> saved_;
};

}  // namespace quantmill::testing
