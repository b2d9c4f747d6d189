# actzip_isa_sources(<target> <folder>): adds <folder>/<isa>.cpp for every instruction set of the machine
# that is compiled for, each with its own flags. Those thin files include the algorithm, which is written
# once; nothing else in the tree is compiled above the platform's baseline, so that an old CPU never meets
# an illegal instruction. Defines ACTZIP_HAVE_<ISA> on the target for the dispatch table.
set(ACTZIP_FLAGS_baseline "")
if(MSVC AND NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang") # clang-cl takes the flags of the others
  set(ACTZIP_FLAGS_avx2 /arch:AVX2)
  set(ACTZIP_FLAGS_avx512 /arch:AVX512)
  set(ACTZIP_FLAGS_avx512_icl /arch:AVX512)
else()
  set(ACTZIP_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt)
  set(ACTZIP_FLAGS_avx512 ${ACTZIP_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd
                          -mprefer-vector-width=512)
  set(ACTZIP_FLAGS_avx512_icl ${ACTZIP_FLAGS_avx512} -mavx512vbmi -mavx512vbmi2 -mavx512vnni
                              -mavx512bitalg -mavx512vpopcntdq -mavx512ifma)
endif()
set(ACTZIP_FLAGS_neon "")

if(CMAKE_OSX_ARCHITECTURES) # macOS builds for the other processor too
  set(ACTZIP_PROCESSOR "${CMAKE_OSX_ARCHITECTURES}")
else()
  set(ACTZIP_PROCESSOR "${CMAKE_SYSTEM_PROCESSOR}")
endif()
if(ACTZIP_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(ACTZIP_ISAS baseline avx2 avx512 avx512_icl)
elseif(ACTZIP_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  set(ACTZIP_ISAS baseline neon)
else()
  set(ACTZIP_ISAS baseline)
endif()

function(actzip_isa_sources target folder)
  foreach(isa IN LISTS ACTZIP_ISAS)
    set(file "${CMAKE_CURRENT_SOURCE_DIR}/${folder}/${isa}.cpp")
    if(EXISTS "${file}")
      target_sources(${target} PRIVATE "${file}")
      set_source_files_properties("${file}" PROPERTIES COMPILE_OPTIONS "${ACTZIP_FLAGS_${isa}}")
      string(TOUPPER ${isa} ISA)
      target_compile_definitions(${target} PRIVATE ACTZIP_HAVE_${ISA}=1)
    endif()
  endforeach()
endfunction()
