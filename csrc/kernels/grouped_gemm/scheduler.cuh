// Which tile a block computes next, found on the device from expert_offsets: no host needs to know the loads.
//
// Tiles are numbered expert by expert, inside an expert by column tile, inside that by row tile, so that neighbouring
// blocks share the weights' tile. Block b computes tiles b, b + gridDim.x, .... The rows behind the last expert (slots
// whose id was no expert) are one more group, and so are rows before the first one (where offsets are a slice of a
// plan's); their outputs are zeros.
//
// kBalanced: a group's row tiles are equally high, a multiple of 8, and no higher than kTileRows. kPairs: what is
// numbered are pairs of neighbouring column tiles, and blocks 2 c and 2 c + 1 compute those of pairs c, c + gridDim.x /
// 2, ...; column_tiles is even.
#pragma once

#include <cstdint>

namespace moe {

struct Tile {
  int expert;     // num_experts or more: rows without an expert
  int row_begin;  // first row of the tile
  int row_end;    // one past the last row of the group (balanced: of the tile): rows beyond it are not this tile's
  int column_tile;
  int height;  // rows of the tile, those beyond row_end included
};

template <int kTileRows, bool kBalanced = false, bool kPairs = false>
class TileScheduler {
 public:
  __device__ TileScheduler(const int32_t* expert_offsets, int num_experts, int num_rows, int column_tiles)
      : offsets_(expert_offsets),
        num_experts_(num_experts),
        num_rows_(num_rows),
        column_tiles_(column_tiles / kAbreast),
        index_(blockIdx.x / kAbreast) {}

  // Warp-collective: every warp of the block finds the same tile. False: no tile is left. The groups are read anew for
  // every tile: kept from one to the next they would cost registers in the products between.
  __device__ bool next(Tile& tile) {
    Groups groups = load_groups();
    while (index_ >= (tiles_before_ + __shfl_sync(~0u, groups.inclusive, 31)) * column_tiles_) {
      tiles_before_ += __shfl_sync(~0u, groups.inclusive, 31);
      first_group_ += 32;
      if (first_group_ > num_experts_ + 1) return false;
      groups = load_groups();
    }
    const unsigned reached = __ballot_sync(~0u, index_ < (tiles_before_ + groups.inclusive) * column_tiles_);
    const int owner = __ffs(reached) - 1;
    const int begin = __shfl_sync(~0u, groups.begin, owner);
    const int end = __shfl_sync(~0u, groups.end, owner);
    const int inclusive = __shfl_sync(~0u, groups.inclusive, owner);
    const int row_tiles = row_tiles_of(begin, end);
    const int local = index_ - (tiles_before_ + inclusive - row_tiles) * column_tiles_;
    tile.expert = first_group_ + owner;
    tile.column_tile = local / row_tiles;
    tile.height = kBalanced ? ((end - begin + row_tiles - 1) / row_tiles + 7) / 8 * 8 : kTileRows;
    tile.row_begin = begin + (local - tile.column_tile * row_tiles) * tile.height;
    tile.row_end = kBalanced ? min(tile.row_begin + tile.height, end) : end;
    index_ += gridDim.x / kAbreast;
    if (kPairs) tile.column_tile = tile.column_tile * 2 + blockIdx.x % 2;
    return true;
  }

 private:
  static constexpr int kAbreast = kPairs ? 2 : 1;

  __device__ static int row_tiles_of(int begin, int end) { return (end - begin + kTileRows - 1) / kTileRows; }

  // Of lane l: group first_group_ + l, and the row tiles of the groups from first_group_ to it.
  struct Groups {
    int begin, end, inclusive;
  };

  __device__ Groups load_groups() const {
    const int lane = threadIdx.x % 32;
    const int group = first_group_ + lane;
    Groups groups;
    groups.begin = group <= num_experts_ ? min(__ldg(offsets_ + group), num_rows_) : 0;
    groups.end = group == num_experts_       ? num_rows_
                 : group <= num_experts_ + 1 ? min(__ldg(offsets_ + (group < num_experts_ ? group + 1 : 0)), num_rows_)
                                             : 0;
    groups.inclusive = row_tiles_of(groups.begin, groups.end);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int lower = __shfl_up_sync(~0u, groups.inclusive, distance);
      if (lane >= distance) groups.inclusive += lower;
    }
    return groups;
  }

  const int32_t* offsets_;
  int num_experts_, num_rows_, column_tiles_;
  int index_;
  int first_group_ = 0;
  int tiles_before_ = 0;  // row tiles of the groups before first_group_
};

}  // namespace moe
