// Which tiles of y the matmul kernel has to make, and in which order: a tile is some rows of W (a unit) times TOKENS tokens.
//
// For one matrix tiles are counted off in bands of tokens. For a stack of matrices (GROUPED: the experts of a mixture) the
// rows of x are sorted by expert, and only the device knows how many each has. Every block then counts the tiles of all
// experts for itself (a scan of a warp, some hundred cycles), so one launch does with nothing from the host; tile numbers
// run through the experts one by one, and an expert is found by bisection.
//
// CUT, the last tiles are shared evenly: what is more than whole waves of tiles, and one wave, is one row of chunks that
// all blocks take equal parts of. A part may begin and end inside a tile. Whoever has a tile's first chunk adds up what the
// others leave in a workspace, in the order of k. Parts go to blocks backwards, so that a block waits for blocks with
// smaller numbers only. GPUs start blocks in the order of their numbers, so it never waits for one that has no SM.

// The unit-th rows of an expert's W times TOKENS tokens from `token` on; `end` is the first that is not the expert's.
struct Tile {
  int unit, token, end, expert;
};

// A block's next product: `count` chunks of tile number `at`, from chunk `first` on.
struct Turn {
  int at, first, count;
};

struct Work {
  int m, n, tiles, span, units, token_tiles, chunks;  // tiles: row tiles of W; units: `span` of them
  int first, count, begin, stride;                    // the chunks and the tiles of this block
  int experts;
  const int* ends;  // in shared memory: expert's first row of x that is not its own; behind them, tiles up to its last
  __device__ __forceinline__ int total() const { return GROUPED ? ends[2 * experts - 1] : units * token_tiles; }
#if CUT
  // Tiles in front of those that are shared, and where block `block`'s part of those begins, in chunks.
  __device__ __forceinline__ int whole() const { return max(0, total() / (int)gridDim.x - 1) * (int)gridDim.x; }
  __device__ __forceinline__ int part(int block) const {
    return (total() - whole()) * chunks * ((int)gridDim.x - 1 - block) / (int)gridDim.x;
  }
  __device__ __forceinline__ Turn shared_turn(int chunk) const {
    const int tile = chunk / chunks, from = chunk - tile * chunks, left = part((int)blockIdx.x - 1) - chunk;
    return {left > 0 ? whole() + tile : total(), from, min(chunks - from, left)};
  }
  __device__ __forceinline__ Turn first_turn() const {
    return whole() > 0 ? Turn{(int)blockIdx.x, 0, chunks} : shared_turn(part(blockIdx.x));
  }
  __device__ __forceinline__ void next(Turn& turn) const {
    const int behind = turn.at - whole();
    if (behind + (int)gridDim.x < 0) turn.at += gridDim.x;
    else turn = shared_turn(behind < 0 ? part(blockIdx.x) : behind * chunks + turn.first + turn.count);
  }
#else
  __device__ __forceinline__ Turn first_turn() const { return {begin, first, count}; }
  __device__ __forceinline__ void next(Turn& turn) const { turn.at += stride; }
#endif
  // Tile number `at`: bands of tokens, and within a band the tokens fastest.
  __device__ __forceinline__ void locate(int at, Tile& tile) const {
    if (GROUPED) {
      locate_expert(at, tile);
      return;
    }
    tile.end = m, tile.expert = 0;
    locate_tile(at, units, token_tiles, tile.unit, tile.token);
    tile.token *= TOKENS;
  }
  __device__ __forceinline__ void locate_expert(int at, Tile& tile) const {
    const int* last = ends + experts;
    int low = 0, high = experts - 1;
    while (low < high) {  // the first expert whose tiles end behind `at`
      const int middle = (low + high) / 2;
      if (last[middle] > at) high = middle;
      else low = middle + 1;
    }
    const int before = low ? last[low - 1] : 0, row = low ? ends[low - 1] : 0;
    const int width = (last[low] - before) / units, rest = at - before;
    tile = {rest / width, row + rest % width * TOKENS, ends[low], low};
  }
};

// Which tiles there are, from the ends of the experts' rows; whatever they are, no row is outside x. One warp.
__device__ __forceinline__ void count_tiles(int* ends, const int* offsets, int experts, int m, int units, int lane) {
  const int run = (experts + 31) / 32, first = min(lane * run, experts), beyond = min(first + run, experts);
  int begin = first ? min(max(offsets[first - 1], 0), m) : 0, sum = 0;
  for (int expert = first; expert < beyond; ++expert) {
    const int end = min(max(offsets[expert], begin), m);
    sum += (end - begin + TOKENS - 1) / TOKENS * units;
    ends[expert] = end, ends[experts + expert] = sum;
    begin = end;
  }
  int before = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  for (int expert = first; expert < beyond; ++expert) ends[experts + expert] += before - sum;
}
