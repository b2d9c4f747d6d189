// CRC-32C (Castagnoli, as in iSCSI and ext4): reflected polynomial 0x82f63b78, initial value and final xor
// 0xffffffff. The CRC of "123456789" is 0xe3069283.
#pragma once

#include <cstddef>
#include <cstdint>

namespace actzip::codec {

uint32_t crc32c(const uint8_t* data, size_t size);

}  // namespace actzip::codec
