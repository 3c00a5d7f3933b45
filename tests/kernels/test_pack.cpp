#include <cstdint>
#include <vector>

#include "tests/kernels/backend_test.h"

namespace quantmill::testing {
namespace {

class Pack : public BackendTest {
protected:
    std::vector<std::uint8_t> codes_of(std::int64_t count, int bits) {
        std::vector<std::uint8_t> codes(static_cast<std::size_t>(count));
        for (auto& code : codes) code = static_cast<std::uint8_t>(integer(0, (1 << bits) - 1));
        return codes;
    }

    std::vector<std::int32_t> packed(const std::vector<std::uint8_t>& codes, std::int64_t rows,
                                     std::int64_t columns, int bits) {
        Tensor words = backend().empty({columns * bits / 32, rows}, DType::i32, "words");
        backend().pack(upload(codes, {rows, columns}), bits, words);
        return download<std::int32_t>(words);
    }
};

// Bit b of code c of a row is bit (c · bits + b) of the row's stream; word w of the stream is row w.
TEST_P(Pack, EveryBitStandsWhereTheStreamSays) {
    SCOPED_TRACE(trace());
    for (const int bits : {2, 3, 4, 8}) {
        for (const std::int64_t rows : {1, 3, 130}) {
            const std::int64_t columns = 32 * integer(1, 5);
            SCOPED_TRACE(::testing::Message() << bits << " bits, " << rows << "x" << columns);
            const auto codes = codes_of(rows * columns, bits);
            const auto words = packed(codes, rows, columns, bits);
            for (std::int64_t r = 0; r < rows; ++r) {
                for (std::int64_t bit = 0; bit < columns * bits; ++bit) {
                    const auto word = static_cast<std::uint32_t>(words[bit / 32 * rows + r]);
                    const unsigned code = codes[r * columns + bit / bits];
                    ASSERT_EQ((word >> (bit % 32)) & 1U, (code >> (bit % bits)) & 1U) << bit;
                }
            }
        }
    }
}

TEST_P(Pack, UnpackGivesTheCodesBack) {
    SCOPED_TRACE(trace());
    for (const int bits : {2, 3, 4, 8}) {
        const std::int64_t rows = integer(1, 100);
        const auto codes = codes_of(rows * 96, bits);
        Tensor words = upload(packed(codes, rows, 96, bits), {3 * bits, rows});
        Tensor back = backend().empty({rows, 96}, DType::u8, "codes");
        backend().unpack(words, bits, back);
        EXPECT_EQ(download<std::uint8_t>(back), codes);
    }
}

TEST_P(Pack, RefusesWidthsThatDoNotFillWords) {
    Tensor words = backend().empty({4, 1}, DType::i32, "words");
    EXPECT_THROW(backend().pack(upload(codes_of(33, 4), {1, 33}), 4, words), InternalError);
    EXPECT_THROW(backend().pack(upload(codes_of(64, 4), {1, 64}), 4, words), InternalError);
}

INSTANTIATE_TEST_SUITE_P(Backends, Pack, ::testing::ValuesIn(built_backends()), backend_name);

}  // namespace
}  // namespace quantmill::testing
