#include "pipeline/sha256.h"

#include <openssl/evp.h>

#include "kernels/error.h"

namespace quantmill {

struct Sha256::State {
    std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context{EVP_MD_CTX_new(), &EVP_MD_CTX_free};
};

Sha256::Sha256() : state_(std::make_unique<State>()) {
    if (!state_->context || EVP_DigestInit_ex(state_->context.get(), EVP_sha256(), nullptr) != 1) {
        throw InternalError("OpenSSL offers no SHA-256");
    }
}

Sha256::~Sha256() = default;

void Sha256::add(const void* data, std::size_t bytes) {
    if (EVP_DigestUpdate(state_->context.get(), data, bytes) != 1) {
        throw InternalError("OpenSSL's SHA-256 failed");
    }
}

std::string Sha256::finish() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int length = 0;
    if (EVP_DigestFinal_ex(state_->context.get(), digest, &length) != 1) {
        throw InternalError("OpenSSL's SHA-256 failed");
    }
    std::string text;
    for (unsigned int i = 0; i < length; ++i) text += fmt::format("{:02x}", digest[i]);
    return text;
}

}  // namespace quantmill
