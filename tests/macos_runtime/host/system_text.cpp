// Text: printing and scanning, which are variadic, and the only locale, "C".

#include <ctype.h>
#include <errno.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <wchar.h>

#include "stand_ins.h"
#include "variadic.h"

namespace macho {

extern "C" {

__attribute__((used)) int macho_snprintf(char* out, size_t bytes, const char* format, void* stack) {
  va_list arguments;
  read_arguments(&arguments, stack);
  return vsnprintf(out, bytes, format, arguments);
}

__attribute__((used)) int macho_fprintf(FILE* out, const char* format, void* stack) {
  va_list arguments;
  read_arguments(&arguments, stack);
  return vfprintf(out, format, arguments);
}

__attribute__((used)) int macho_printf(const char* format, void* stack) {
  return macho_fprintf(stdout, format, stack);
}

__attribute__((used)) int macho_asprintf(char** out, const char* format, void* stack) {
  va_list arguments;
  read_arguments(&arguments, stack);
  return vasprintf(out, format, arguments);
}

__attribute__((used)) int macho_sscanf(const char* text, const char* format, void* stack) {
  va_list arguments;
  read_arguments(&arguments, stack);
  return vsscanf(text, format, arguments);
}

// The same with a locale.
__attribute__((used)) int macho_snprintf_l(char* out, size_t bytes, void*, const char* format,
                                           void* stack) {
  return macho_snprintf(out, bytes, format, stack);
}

__attribute__((used)) int macho_asprintf_l(char** out, void*, const char* format, void* stack) {
  return macho_asprintf(out, format, stack);
}

__attribute__((used)) int macho_sscanf_l(const char* text, void*, const char* format, void* stack) {
  return macho_sscanf(text, format, stack);
}

}  // extern "C"

VARIADIC(macho_variadic_snprintf, 3, macho_snprintf);
VARIADIC(macho_variadic_fprintf, 2, macho_fprintf);
VARIADIC(macho_variadic_printf, 1, macho_printf);
VARIADIC(macho_variadic_asprintf, 2, macho_asprintf);
VARIADIC(macho_variadic_sscanf, 2, macho_sscanf);
VARIADIC(macho_variadic_snprintf_l, 4, macho_snprintf_l);
VARIADIC(macho_variadic_asprintf_l, 3, macho_asprintf_l);
VARIADIC(macho_variadic_sscanf_l, 3, macho_sscanf_l);

namespace {

// glibc's va_list functions serve as they are: Darwin's va_list is a plain pointer to the
// arguments.
int print_list(char* out, size_t bytes, const char* format, void* list) {
  return macho_snprintf(out, bytes, format, list);
}
int print_list_to_file(FILE* out, const char* format, void* list) {
  return macho_fprintf(out, format, list);
}
int print_list_to_memory(char** out, const char* format, void* list) {
  return macho_asprintf(out, format, list);
}
int scan_list(const char* text, const char* format, void* list) {
  return macho_sscanf(text, format, list);
}

// libc++ reads the classes of characters from this table of Darwin's: _RuneLocale.
struct RuneLocale {
  char magic[8], encoding[32];
  void* functions[2];
  int32_t invalid;
  uint32_t types[256];
  int32_t lower[256], upper[256];
  char ranges[4096];
};

const RuneLocale kRunes = [] {
  constexpr struct {
    uint32_t bit;
    int (*is)(int);
  } kClasses[] = {{0x100, isalpha},    {0x200, iscntrl},   {0x400, isdigit},  {0x800, isgraph},
                  {0x1000, islower},   {0x2000, ispunct},  {0x4000, isspace}, {0x8000, isupper},
                  {0x10000, isxdigit}, {0x20000, isblank}, {0x40000, isprint}};
  RuneLocale runes{};
  for (int c = 0; c < 256; ++c) {
    runes.lower[c] = runes.upper[c] = c;
    if (c >= 128) continue;
    for (const auto& one : kClasses) {
      if (one.is(c) != 0) runes.types[c] |= one.bit;
    }
    runes.lower[c] = tolower(c);
    runes.upper[c] = toupper(c);
  }
  return runes;
}();

int mask_rune(int c, unsigned long mask) {
  return c >= 0 && c < 256 ? static_cast<int>(kRunes.types[c] & mask) : 0;
}
int mask_rune_in(int c, unsigned long mask, void*) { return mask_rune(c, mask); }
int lower(int c) { return c >= 0 && c < 256 ? kRunes.lower[c] : c; }
int upper(int c) { return c >= 0 && c < 256 ? kRunes.upper[c] : c; }

void* new_locale(int, const char* name, void*) {
  static int the_locale;
  if (name != nullptr && *name != '\0' && strcmp(name, "C") != 0 && strcmp(name, "POSIX") != 0) {
    errno = ENOENT;
    return nullptr;
  }
  return &the_locale;
}
int free_locale(void*) { return 0; }
void* use_locale(void*) { return reinterpret_cast<void*>(-1); }  // LC_GLOBAL_LOCALE
lconv* conventions(void*) { return localeconv(); }
int bytes_of_character() { return 1; }

double to_double(const char* text, char** end, void*) { return strtod(text, end); }
float to_float(const char* text, char** end, void*) { return strtof(text, end); }
int is_digit(int c, void*) { return isdigit(c); }
int is_hexadecimal(int c, void*) { return isxdigit(c); }
int compare(const char* a, const char* b, void*) { return strcmp(a, b); }

// In "C" a wide character is a byte.
size_t to_wide(wchar_t* out, const char* text, size_t bytes, void*, void*) {
  if (text == nullptr || bytes == 0) return 0;
  if (out != nullptr) *out = static_cast<unsigned char>(*text);
  return *text != '\0';
}
int to_wide_without_state(wchar_t* out, const char* text, size_t bytes, void*) {
  return static_cast<int>(to_wide(out, text, bytes, nullptr, nullptr));
}
size_t to_narrow(char* out, wchar_t c, void*, void*) {
  if (out != nullptr) *out = static_cast<char>(c);
  return 1;
}
int same_character(int c, void*) { return c; }

const StandIns kText{
    {"_snprintf", function(macho_variadic_snprintf)},
    {"_fprintf", function(macho_variadic_fprintf)},
    {"_printf", function(macho_variadic_printf)},
    {"_asprintf", function(macho_variadic_asprintf)},
    {"_sscanf", function(macho_variadic_sscanf)},
    {"_snprintf_l", function(macho_variadic_snprintf_l)},
    {"_asprintf_l", function(macho_variadic_asprintf_l)},
    {"_sscanf_l", function(macho_variadic_sscanf_l)},
    {"_vsnprintf", function(print_list)},
    {"_vfprintf", function(print_list_to_file)},
    {"_vasprintf", function(print_list_to_memory)},
    {"_vsscanf", function(scan_list)},
    {"__DefaultRuneLocale", &kRunes},
    {"___maskrune", function(mask_rune)},
    {"___maskrune_l", function(mask_rune_in)},
    {"___tolower", function(lower)},
    {"___toupper", function(upper)},
    {"____tolower_l", function(lower)},
    {"____toupper_l", function(upper)},
    {"_tolower_l", function(lower)},
    {"_toupper_l", function(upper)},
    {"_newlocale", function(new_locale)},
    {"_freelocale", function(free_locale)},
    {"_uselocale", function(use_locale)},
    {"_localeconv", function(localeconv)},
    {"_localeconv_l", function(conventions)},
    {"____mb_cur_max", function(bytes_of_character)},
    {"____mb_cur_max_l", function(bytes_of_character)},
    {"_strtod_l", function(to_double)},
    {"_strtold", function(strtod)},  // long double is double
    {"_strtold_l", function(to_double)},
    {"_strtof_l", function(to_float)},
    {"_isdigit_l", function(is_digit)},
    {"_isxdigit_l", function(is_hexadecimal)},
    {"_strcoll_l", function(compare)},
    {"_mbrtowc_l", function(to_wide)},
    {"_mbtowc_l", function(to_wide_without_state)},
    {"_wcrtomb_l", function(to_narrow)},
    {"_btowc_l", function(same_character)},
    {"_wctob_l", function(same_character)},
};

const StandIns kSame{
    "atoi",    "btowc",    "memchr",  "memcmp",    "memcpy",   "memmove", "memset",   "strchr",
    "strcmp",  "strcoll",  "strcpy",  "strdup",    "strlen",   "strncmp", "strncpy",  "strrchr",
    "strstr",  "strtod",   "strtof",  "strtol",    "strtoll",  "strtoul", "strtoull", "strxfrm",
    "wcscoll", "wcslen",   "wcstod",  "wcstol",    "wcsxfrm",  "wctob",   "wmemchr",  "wmemcmp",
    "wmemcpy", "wmemmove", "wmemset", "setlocale", "strerror", "bzero",
};

}  // namespace

}  // namespace macho
