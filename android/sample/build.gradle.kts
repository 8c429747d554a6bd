// A chat in one screen.
plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "dev.kinglet.sample"
    compileSdk = 35
    defaultConfig {
        applicationId = "dev.kinglet.sample"
        minSdk = 23
        targetSdk = 35
        versionCode = 1
        versionName = "0.1.0"
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }
    kotlinOptions { jvmTarget = "1.8" }
}

dependencies {
    implementation(project(":kinglet"))
    implementation("org.jetbrains.kotlinx:kotlinx-coroutines-android:1.8.0") // Dispatchers.Main
}
