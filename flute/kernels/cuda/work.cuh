// Which tiles of y the matmul kernel has to make, and in which order: a tile is some rows of W (a unit) times TOKENS tokens.
//
// For one matrix tiles are counted off in bands of tokens. For a stack of matrices (GROUPED: the experts of a mixture) the
// rows of x are sorted by expert, and only the device knows how many each has. Every block then counts the tiles of all
// experts for itself (a scan of a warp, some hundred cycles), so one launch does with nothing from the host; tile numbers
// run through the experts one by one, and an expert is found by bisection.

// The unit-th rows of an expert's W times TOKENS tokens from `token` on; `end` is the first that is not the expert's.
struct Tile {
  int unit, token, end, expert;
};

struct Work {
  int m, n, tiles, span, units, token_tiles, first, count;  // tiles: row tiles of W; units: `span` of them
  int experts;
  const int* ends;  // in shared memory: expert's first row of x that is not its own; behind them, tiles up to its last
  __device__ __forceinline__ int total() const { return GROUPED ? ends[2 * experts - 1] : units * token_tiles; }
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
