// The kept entries of a matrix in the order of a cache-blocked product: tiles of rows, in each tile
// blocks of columns, in each block row by row. A column is stored as its place in the block, one
// byte.
//
// As one buffer: BlockedHeader, then offsets, counts and columns.
#pragma once

#include <cstdint>

namespace tscnc {

constexpr int64_t kBlockedTileRows = 256;
// A panel of a block has this many features: any stored column then leads to memory of the panel.
constexpr int64_t kBlockedColumnValues = 256;

struct BlockedHeader {
  int64_t magic;
  int64_t rows;
  int64_t width;
  int64_t block_width;
  int64_t kept;
};
constexpr int64_t kBlockedMagic = 0x315844494b4c4254;

struct BlockedRows {
  int64_t rows;
  int64_t width;
  int64_t block_width;
  int64_t kept;
  const int32_t* offsets;  // (tiles * blocks + 1,), the first entry of each block of a tile
  const uint8_t* counts;   // (rows * blocks,), entries of each row of each block
  const uint8_t* columns;  // (kept,)

  int64_t blocks() const { return (width + block_width - 1) / block_width; }
  int64_t tiles() const { return (rows + kBlockedTileRows - 1) / kBlockedTileRows; }
  int64_t tile_rows(int64_t tile) const {
    const int64_t left = rows - tile * kBlockedTileRows;
    return left < kBlockedTileRows ? left : kBlockedTileRows;
  }
  int64_t first_entry(int64_t tile, int64_t block) const {
    return offsets[tile * blocks() + block];
  }
  // Counts of the tile's rows in the block.
  const uint8_t* row_counts(int64_t tile, int64_t block) const {
    return counts + tile * kBlockedTileRows * blocks() + block * tile_rows(tile);
  }
  // Features of a panel that a product reads from.
  int64_t panel_features() const { return (blocks() - 1) * block_width + kBlockedColumnValues; }
};

// Wide blocks make long rows, narrow ones leave more of the first-level cache to the weights.
inline int64_t blocked_width(int64_t rows, int64_t width, int64_t kept) {
  return kept * 10 > rows * width * 3 ? 96 : 128;
}

inline int64_t blocked_bytes(int64_t rows, int64_t width, int64_t block_width, int64_t kept) {
  const int64_t blocks = (width + block_width - 1) / block_width;
  const int64_t tiles = (rows + kBlockedTileRows - 1) / kBlockedTileRows;
  return static_cast<int64_t>(sizeof(BlockedHeader)) + (tiles * blocks + 1) * 4 + rows * blocks +
         kept;
}

inline BlockedRows blocked_rows(const uint8_t* buffer) {
  const auto* header = reinterpret_cast<const BlockedHeader*>(buffer);
  BlockedRows index{header->rows, header->width, header->block_width, header->kept, nullptr,
                    nullptr,      nullptr};
  index.offsets = reinterpret_cast<const int32_t*>(header + 1);
  index.counts =
      reinterpret_cast<const uint8_t*>(index.offsets + index.tiles() * index.blocks() + 1);
  index.columns = index.counts + index.rows * index.blocks();
  return index;
}

// Calls visit(row, block, entry, place, count) for every row of every block of tiles [begin, end),
// in the order of the entries; `place` is where the row's entries of the block begin in row-major
// order.
template <class Visit>
void for_each_segment(const BlockedRows& index, int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t rows = index.tile_rows(tile);
    int64_t places[kBlockedTileRows + 1] = {};
    for (int64_t block = 0; block < index.blocks(); ++block) {
      const uint8_t* counts = index.row_counts(tile, block);
      for (int64_t row = 0; row < rows; ++row) places[row + 1] += counts[row];
    }
    places[0] = index.first_entry(tile, 0);
    for (int64_t row = 0; row < rows; ++row) places[row + 1] += places[row];
    for (int64_t block = 0; block < index.blocks(); ++block) {
      const uint8_t* counts = index.row_counts(tile, block);
      int64_t entry = index.first_entry(tile, block);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t count = counts[row];
        visit(tile * kBlockedTileRows + row, block, entry, places[row], count);
        entry += count;
        places[row] += count;
      }
    }
  }
}

}  // namespace tscnc
