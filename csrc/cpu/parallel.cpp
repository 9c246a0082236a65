#include "cpu/parallel.h"

#include <dlfcn.h>
#ifdef __linux__
#include <link.h>
#endif

#include <string>
#include <utility>

namespace icon2 {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
  int (*max_threads)() = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  std::string path;
};

OpenMP openmp;

bool load(const char* path) {
  void* library = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);  // a reference to what is loaded, nothing new
  if (library == nullptr) return false;
  OpenMP found;
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
  found.max_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
  found.thread_num = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
  found.num_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads"));
  found.in_parallel = reinterpret_cast<int (*)()>(dlsym(library, "omp_in_parallel"));
  if (!found.parallel || !found.max_threads || !found.thread_num || !found.num_threads || !found.in_parallel) {
    dlclose(library);
    return false;
  }
  found.path = path;
  openmp = std::move(found);
  return true;
}

#ifdef __linux__
struct Search {
  std::string preferred, first, best;
};

int visit(dl_phdr_info* info, size_t, void* data) {
  auto& search = *static_cast<Search*>(data);
  const std::string path = info->dlpi_name;
  const std::string name = path.substr(path.rfind('/') + 1);
  if (name.rfind("libgomp", 0) != 0 && name.rfind("libomp", 0) != 0 && name.rfind("libiomp", 0) != 0) return 0;
  if (search.first.empty()) search.first = path;
  if (search.best.empty() && path.rfind(search.preferred, 0) == 0) search.best = path;
  return 0;
}
#endif

struct Job {
  void (*body)(void*, int64_t, int64_t);
  void* data;
  int64_t n;
};

void work(void* data) {
  const Job& job = *static_cast<Job*>(data);
  const int64_t team = openmp.num_threads(), me = openmp.thread_num();
  const int64_t begin = job.n * me / team, end = job.n * (me + 1) / team;
  if (begin < end) job.body(job.data, begin, end);
}

}  // namespace

bool use_openmp(const char* preferred) {
#ifdef __linux__
  Search search{preferred, "", ""};
  dl_iterate_phdr(visit, &search);
  return (!search.best.empty() && load(search.best.c_str())) || (!search.first.empty() && load(search.first.c_str()));
#else
  (void)preferred;
  (void)load;
  return false;
#endif
}

const char* openmp_path() { return openmp.path.c_str(); }

int max_threads() { return openmp.parallel ? openmp.max_threads() : 1; }

void run_parallel(int64_t n, int64_t work_each, void (*body)(void*, int64_t, int64_t), void* data) {
  if (n <= 0) return;
  const int64_t worth = n * work_each / kWorkPerThread + 1;
  int64_t threads = worth < n ? worth : n;
  if (threads > 1) {
    const int64_t most = openmp.parallel && !openmp.in_parallel() ? openmp.max_threads() : 1;
    threads = threads < most ? threads : most;
  }
  if (threads <= 1) {
    body(data, 0, n);
    return;
  }
  Job job{body, data, n};
  openmp.parallel(work, &job, static_cast<unsigned>(threads), 0);
}

}  // namespace icon2
