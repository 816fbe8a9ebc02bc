// Whether all elements of a vector are finite. The exponents of infinity and NaN are all ones: one
// more in their lowest bit carries into the bit of the sign, which was masked out.
#include <cstdint>

namespace {

template <typename Bits>
int all_finite(const Bits* x, int64_t n, Bits exponent) {
  constexpr Bits kSign = ~(~Bits{0} >> 1);
  const Bits lowest = kSign - exponent;
  Bits found = 0;
  for (int64_t i = 0; i < n; ++i) found |= (x[i] & exponent) + lowest;
  return (found & kSign) == 0;
}

}  // namespace

extern "C" {

int mpd_all_finite_f32(const uint32_t* x, int64_t n) {
  return all_finite<uint32_t>(x, n, 0x7F800000);
}

int mpd_all_finite_f64(const uint64_t* x, int64_t n) {
  return all_finite<uint64_t>(x, n, 0x7FF0000000000000);
}
}
